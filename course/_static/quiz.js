/* Questions that check themselves. The page holds a salted SHA-256 of each key, never the key. */
(function () {
  "use strict";
  const SALT = "mambakit course";

  /* SHA-256 (FIPS 180-4) of a text. Browsers offer it on secure pages only, and this one may be a file. */
  function sha256(text) {
    const primes = [];
    for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
    const fraction = (x) => Math.floor((x - Math.floor(x)) * 4294967296);
    const k = primes.map((p) => fraction(Math.cbrt(p)));
    const h = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
    const bytes = [...new TextEncoder().encode(text)];
    const bits = bytes.length * 8;
    bytes.push(0x80);
    while (bytes.length % 64 !== 56) bytes.push(0);
    for (let i = 7; i >= 0; i--) bytes.push(Math.floor(bits / Math.pow(256, i)) & 255);
    const turn = (x, n) => (x >>> n) | (x << (32 - n));
    for (let at = 0; at < bytes.length; at += 64) {
      const w = [];
      for (let i = 0; i < 16; i++) {
        w[i] = (bytes[at + 4 * i] << 24) | (bytes[at + 4 * i + 1] << 16) | (bytes[at + 4 * i + 2] << 8) | bytes[at + 4 * i + 3];
      }
      for (let i = 16; i < 64; i++) {
        const s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ (w[i - 15] >>> 3);
        const s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ (w[i - 2] >>> 10);
        w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
      }
      let [a, b, c, d, e, f, g, q] = h;
      for (let i = 0; i < 64; i++) {
        const t1 = (q + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i]) | 0;
        const t2 = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
        q = g; g = f; f = e; e = (d + t1) | 0; d = c; c = b; b = a; a = (t1 + t2) | 0;
      }
      [a, b, c, d, e, f, g, q].forEach((v, i) => { h[i] = (h[i] + v) | 0; });
    }
    return h.map((v) => (v >>> 0).toString(16).padStart(8, "0")).join("");
  }

  function decoded(text) {
    return new TextDecoder().decode(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  }

  /* A number as the key was hashed: three significant digits. */
  function rounded(text) {
    const value = Number(text.trim().replace(",", ".").replace(/[×x*]\s*10\^?/, "e"));
    if (!text.trim() || !Number.isFinite(value)) return null;
    return value.toExponential(2);
  }

  function given(form, facts) {
    if (facts.type === "choice") {
      return [...form.querySelectorAll("input:checked")].map((box) => Number(box.value)).sort((a, b) => a - b).join(",");
    }
    const text = form.querySelector("input").value;
    return facts.type === "number" ? rounded(text) : text.replace(/\s+/g, "").toLowerCase();
  }

  function set(form) {
    const facts = JSON.parse(form.dataset.quiz);
    const output = form.querySelector("output");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const answer = given(form, facts);
      if (!answer) {
        output.textContent = facts.type === "number" ? "A number, please: 0.125 or 1.3e9." : "Choose or write an answer first.";
        return;
      }
      const right = facts.key.includes(sha256(SALT + "|" + form.dataset.id + "|" + answer));
      form.classList.toggle("right", right);
      form.classList.toggle("wrong", !right);
      output.textContent = (right ? "Right. " : "Not yet. ") + (right && facts.why ? decoded(facts.why) : "");
      form.querySelectorAll("li").forEach((item, index) => {
        const why = item.querySelector(".why");
        why.hidden = !item.querySelector("input").checked;
        why.textContent = decoded(facts.whys[index]);
      });
    });
  }

  function setAll() {
    document.querySelectorAll("form.quiz-item").forEach(set);
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", setAll);
  else setAll();
})();
