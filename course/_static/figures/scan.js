/* A recurrence computed in rounds of the logarithm of its length: which pairs each round combines.

   data: schemes: [{name, rounds: [{pairs: [[left, right]], values: [per position]}]}], inputs [texts or numbers],
   result [numbers] */
CourseFigures.register("scan", function (root, data, tools) {
  "use strict";
  let scheme;
  const limit = () => data.schemes[scheme.value].rounds.length;
  scheme = tools.choice(tools.controls, {
    label: "scheme", names: data.schemes.map((s) => s.name),
    change: () => { round.input.max = limit(); round.value = Math.min(round.value, limit()); tools.redraw(); }
  });
  const round = tools.slider(tools.controls, {
    label: "rounds done", min: 0, max: limit(), value: limit(), format: String, change: tools.redraw
  });
  tools.legend(tools.controls, [["one", "combined in this round"], ["plain", "kept"], ["three", "finished prefix"]]);

  return function (width) {
    const rounds = data.schemes[scheme.value].rounds, done = round.value, length = data.inputs.length;
    const margin = 34, step = (width - margin - 14) / Math.max(1, length - 1), tall = 46;
    const height = 36 + tall * rounds.length + 30;
    const svg = tools.shape("svg", {
      viewBox: "0 0 " + width + " " + height, width: width, height: height, role: "img", "aria-label": "tree of the scan"
    }, tools.canvas);
    const X = (i) => margin + i * step, Y = (r) => 22 + r * tall;
    let work = 0;
    for (let r = 0; r <= rounds.length; r++) {
      const shown = r <= done;
      tools.shape("text", { x: 4, y: Y(r) + 4, opacity: shown ? 1 : 0.3 }, svg, String(r));
      if (r > 0) {
        const into = new Map(rounds[r - 1].pairs.map(([a, b]) => [b, a]));
        if (shown) work += into.size;
        for (let i = 0; i < length; i++) {
          if (into.has(i)) {
            tools.shape("line", { class: "line one", x1: X(into.get(i)), y1: Y(r - 1), x2: X(i), y2: Y(r), opacity: shown ? 1 : 0.12 }, svg);
          }
          tools.shape("line", {
            class: "line " + (into.has(i) ? "one" : "plain thin"), x1: X(i), y1: Y(r - 1), x2: X(i), y2: Y(r), opacity: shown ? 1 : 0.12
          }, svg);
        }
      }
    }
    for (let r = 0; r <= rounds.length; r++) {
      const known = r ? rounds[r - 1].finished : data.finished;
      for (let i = 0; i < length; i++) {
        tools.shape("circle", {
          class: "dot " + (known[i] ? "three" : "plain"), cx: X(i), cy: Y(r), r: Math.min(6, step / 3), opacity: r <= done ? 1 : 0.2
        }, svg);
      }
    }
    const values = done ? rounds[done - 1].values : data.inputs;
    if (step > 44) {
      values.forEach((v, i) => tools.shape("text", { x: X(i), y: height - 8, "text-anchor": "middle" }, svg, tools.short(v)));
    }
    tools.say(done + " of " + rounds.length + " rounds for " + length + " tokens (a loop takes " + (length - 1) + "); " + work +
      " combinations so far (a loop needs " + (length - 1) + ")");
  };
});
