/* Layers of a hybrid as boxes, with what they cost.

   data: layers, mamba, attention, mlp, expert, width, rest (parameters), perToken, perLayer (bytes) */
CourseFigures.register("plan", function (root, data, tools) {
  "use strict";
  const add = (label, min, max, value, format) => tools.slider(tools.controls, {
    label: label, min: min, max: max, value: value, format: format || String, change: tools.redraw
  });
  const period = add("one attention layer in", 1, 16, 8);
  const offset = add("attention offset", 0, 15, 4);
  const routed = add("experts every", 1, 8, 2, (v) => v === 8 ? "never" : String(v));
  const experts = add("experts", 2, 32, 16);
  tools.legend(tools.controls, [["two", "attention"], ["one", "Mamba"], ["three", "experts"], ["plain", "one MLP"]]);

  return function (width) {
    const cell = width / data.layers, at = offset.value % period.value;
    const attends = (i) => i % period.value === at;
    const routes = (i) => routed.value < 8 && i % routed.value === routed.value - 1;
    const svg = tools.shape("svg", {
      viewBox: "0 0 " + width + " 76", width: width, height: 76, role: "img", "aria-label": "layers from left to right"
    }, tools.canvas);
    const box = (i, y, kind) => tools.shape("rect", {
      class: "bar " + kind, x: i * cell + 1, y: y, width: Math.max(1, cell - 2), height: 30
    }, svg);
    let all = data.rest, active = data.rest, attention = 0;
    for (let i = 0; i < data.layers; i++) {
      box(i, 4, attends(i) ? "two" : "one");
      box(i, 40, routes(i) ? "three" : "plain");
      attention += attends(i);
      const mixer = attends(i) ? data.attention : data.mamba;
      const router = experts.value * data.width + data.width;
      all += mixer + (routes(i) ? experts.value * data.expert + router : data.mlp);
      active += mixer + (routes(i) ? Math.min(2, experts.value) * data.expert + router : data.mlp);
    }
    const bytes = 262144 * attention * data.perToken + (data.layers - attention) * data.perLayer;
    tools.say((all / 1e9).toFixed(2) + " billion parameters, " + (active / 1e9).toFixed(2) + " active; " +
      attention + " attention layers; " + (bytes / 1073741824).toFixed(2) + " GiB for 256K tokens");
  };
});
