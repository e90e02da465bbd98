/* What the figures of the course share: mounting, drawing in SVG, controls that a keyboard can use.

   A figure's own file calls CourseFigures.register(name, make). make(root, data, tools) builds the controls once and
   returns draw(), which is called whenever the width changes; its own controls call tools.redraw(). */
(function () {
  "use strict";
  if (window.CourseFigures) return;

  const makers = {};
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, attributes, parent, text) {
    const made = document.createElement(name);
    for (const key in attributes || {}) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  function shape(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes || {}) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  /* Round numbers for an axis. */
  function ticks(low, high, count) {
    const raw = (high - low) / Math.max(1, count);
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) {
      found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    }
    return found;
  }

  function short(value) {
    return String(Number(value.toPrecision(3)));
  }

  /* A plane with axes. options: width, height, x: [low, high], y: [low, high], xLabel, yLabel, square. */
  function plot(parent, options) {
    const width = options.width, height = options.height;
    const margin = { left: 46, right: 10, top: options.title ? 24 : 10, bottom: options.xLabel ? 38 : 24 };
    const svg = shape("svg", {
      viewBox: "0 0 " + width + " " + height, width: width, height: height, role: "img",
      "aria-label": options.title || options.yLabel || "plot"
    }, parent);
    const clip = "clip" + Math.random().toString(36).slice(2);
    const inside = shape("clipPath", { id: clip }, shape("defs", {}, svg));
    shape("rect", {
      x: margin.left, y: margin.top, width: width - margin.left - margin.right,
      height: height - margin.top - margin.bottom
    }, inside);
    const X = (v) => margin.left + (v - options.x[0]) / (options.x[1] - options.x[0]) * (width - margin.left - margin.right);
    const Y = (v) => height - margin.bottom - (v - options.y[0]) / (options.y[1] - options.y[0]) * (height - margin.top - margin.bottom);
    const axes = shape("g", { class: "axes" }, svg);
    for (const v of ticks(options.x[0], options.x[1], width / 90)) {
      shape("line", { x1: X(v), x2: X(v), y1: margin.top, y2: height - margin.bottom }, axes);
      shape("text", { x: X(v), y: height - margin.bottom + 15, "text-anchor": "middle" }, axes, short(v));
    }
    for (const v of ticks(options.y[0], options.y[1], height / 36)) {
      shape("line", { x1: margin.left, x2: width - margin.right, y1: Y(v), y2: Y(v) }, axes);
      shape("text", { x: margin.left - 6, y: Y(v) + 4, "text-anchor": "end" }, axes, short(v));
    }
    if (options.xLabel) {
      shape("text", { x: (margin.left + width - margin.right) / 2, y: height - 6, "text-anchor": "middle" }, axes, options.xLabel);
    }
    if (options.title) shape("text", { x: margin.left, y: 15, class: "title" }, axes, options.title);
    const layer = shape("g", { "clip-path": "url(#" + clip + ")" }, svg);
    const bound = (v) => Math.max(-1e5, Math.min(1e5, v));
    return {
      svg: svg, layer: layer, X: X, Y: Y,
      line: (xs, ys, kind) => shape("polyline", {
        class: "line " + kind, points: xs.map((x, i) => X(x).toFixed(1) + "," + bound(Y(ys[i])).toFixed(1)).join(" ")
      }, layer),
      steps: (xs, ys, kind) => shape("path", {
        class: "line " + kind,
        d: xs.map((x, i) => (i ? "H" + X(x).toFixed(1) + "V" : "M" + X(x).toFixed(1) + ",") + bound(Y(ys[i])).toFixed(1)).join("")
      }, layer),
      dots: (xs, ys, kind, radius) => xs.forEach((x, i) => shape("circle", {
        class: "dot " + kind, cx: X(x), cy: bound(Y(ys[i])), r: radius || 3.5
      }, layer)),
      stems: (xs, ys, kind) => xs.forEach((x, i) => {
        shape("line", { class: "stem " + kind, x1: X(x), x2: X(x), y1: Y(0), y2: bound(Y(ys[i])) }, layer);
        shape("circle", { class: "dot " + kind, cx: X(x), cy: bound(Y(ys[i])), r: 3.5 }, layer);
      }),
      bars: (xs, ys, kind, wide) => xs.forEach((x, i) => shape("rect", {
        class: "bar " + (typeof kind === "function" ? kind(i) : kind), x: X(x - wide / 2), width: X(wide) - X(0),
        y: Math.min(Y(0), Y(ys[i])), height: Math.max(0.5, Math.abs(Y(ys[i]) - Y(0)))
      }, layer)),
      text: (x, y, words, anchor) => shape("text", { class: "note", x: X(x), y: Y(y), "text-anchor": anchor || "start" }, layer, words)
    };
  }

  /* Cells of a matrix as colours. values: rows of numbers; color(value) gives a CSS colour. */
  function heat(parent, options) {
    const rows = options.values.length, columns = options.values[0].length;
    const left = options.left || 0, top = options.top || 0;
    const cell = options.cell || (options.width - left) / columns;
    const tall = options.tall || cell;
    const svg = shape("svg", {
      viewBox: "0 0 " + options.width + " " + (top + rows * tall), width: options.width, height: top + rows * tall,
      role: "img", "aria-label": options.title
    }, parent);
    options.values.forEach((row, i) => row.forEach((value, j) => {
      const color = options.color(value, i, j);
      if (color) {
        shape("rect", {
          x: left + j * cell, y: top + i * tall, width: cell + 0.3, height: tall + 0.3, fill: color
        }, svg);
      }
    }));
    return { svg: svg, cell: cell, tall: tall, left: left, top: top };
  }

  /* Blue for negative, white (or the page's colour) for zero, red for positive. */
  function diverging(value, limit) {
    const v = Math.max(-1, Math.min(1, value / limit));
    const share = Math.round(Math.pow(Math.abs(v), 0.7) * 100);
    return "color-mix(in srgb, " + (v < 0 ? "var(--course-blue)" : "var(--course-red)") + " " + share + "%, var(--course-paper))";
  }

  function sequential(share) {
    const v = Math.round(Math.max(0, Math.min(1, share)) * 100);
    return "color-mix(in srgb, var(--course-blue) " + v + "%, var(--course-paper))";
  }

  /* A slider with its name and its value; arrow keys move it. */
  function slider(parent, options) {
    const row = element("label", { class: "control" }, parent);
    element("span", {}, row, options.label);
    const input = element("input", {
      type: "range", min: options.min, max: options.max, step: options.step || 1, value: options.value
    }, row);
    const shown = element("output", {}, row);
    const format = options.format || String;
    const update = () => {
      shown.textContent = format(Number(input.value));
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    input.addEventListener("input", () => { update(); options.change(Number(input.value)); });
    update();
    return {
      input: input, update: update, get value() { return Number(input.value); },
      set value(v) { input.value = v; update(); }
    };
  }

  /* A choice among a few names. */
  function choice(parent, options) {
    const row = element("label", { class: "control" }, parent);
    element("span", {}, row, options.label);
    const input = element("select", {}, row);
    options.names.forEach((name, i) => element("option", { value: i }, input, name));
    input.value = options.value || 0;
    input.addEventListener("change", () => options.change(Number(input.value)));
    return { input: input, get value() { return Number(input.value); } };
  }

  /* Names of lines. entries: [class, words]. */
  function legend(parent, entries) {
    const list = element("p", { class: "legend" }, parent);
    for (const [kind, words] of entries) {
      const item = element("span", { class: "entry" }, list);
      element("i", { class: "swatch " + kind }, item);
      item.appendChild(document.createTextNode(words));
    }
    return list;
  }

  function mount(root) {
    if (root.dataset.mounted) return;
    const make = makers[root.dataset.figure];
    if (!make) return;
    root.dataset.mounted = "yes";
    const data = JSON.parse(root.querySelector("script").textContent);
    const body = element("div", { class: "figure-body" });
    root.insertBefore(body, root.querySelector("figcaption"));
    const controls = element("div", { class: "controls" }, body);
    const canvas = element("div", { class: "canvas" }, body);
    const words = element("p", { class: "readout", "aria-live": "polite" }, body);
    let draw = null;
    const redraw = () => { if (draw) { canvas.replaceChildren(); draw(Math.max(240, Math.floor(canvas.clientWidth))); } };
    const tools = {
      controls: controls, canvas: canvas, redraw: redraw, say: (text) => { words.textContent = text; },
      element: element, shape: shape, plot: plot, heat: heat, slider: slider, choice: choice, legend: legend,
      diverging: diverging, sequential: sequential, short: short,
      before: (node) => body.insertBefore(node, canvas)
    };
    draw = make(root, data, tools);
    redraw();
    let width = canvas.clientWidth;
    new ResizeObserver(() => {
      if (Math.abs(canvas.clientWidth - width) > 1) { width = canvas.clientWidth; redraw(); }
    }).observe(canvas);
  }

  function mountAll() {
    document.querySelectorAll("figure.course-figure").forEach(mount);
  }

  window.CourseFigures = {
    register: (name, make) => { makers[name] = make; },
    mountAll: mountAll
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  else setTimeout(mountAll, 0);
})();
