/* The matrix of a state space model, and the singular values of a block that the reader chooses.

   data: variants: [{name, matrix [rows], limit, singular: {"row,column": [values]}}], chunk sizes [], length;
   the block of position p is rows p.. and columns ..p-1, below the diagonal */
CourseFigures.register("semiseparable", function (root, data, tools) {
  "use strict";
  const variant = tools.choice(tools.controls, { label: "matrix", names: data.variants.map((v) => v.name), change: tools.redraw });
  const split = tools.slider(tools.controls, {
    label: "block below the diagonal, split at", min: 1, max: data.length - 1, value: Math.floor(data.length / 2),
    format: String, change: tools.redraw
  });
  const chunk = tools.choice(tools.controls, {
    label: "chunks of", names: data.chunks.map((q) => q ? String(q) : "none"), change: tools.redraw
  });

  return function (width) {
    const chosen = data.variants[variant.value], p = split.value, q = data.chunks[chunk.value], length = data.length;
    const side = Math.min(width, 360), cell = side / length;
    const box = tools.element("div", { class: "panel" }, tools.canvas);
    const picture = tools.heat(box, {
      values: chosen.matrix, width: side, title: "matrix of the model", color: (v, i, j) => j > i ? null : tools.diverging(v, chosen.limit)
    });
    if (q) {
      for (let i = 0; i < length; i += q) {
        for (let j = 0; j <= i; j += q) {
          tools.shape("rect", {
            class: "frame " + (i === j ? "two" : "three"), x: j * cell, y: i * cell,
            width: Math.min(q, length - j) * cell, height: Math.min(q, length - i) * cell
          }, picture.svg);
        }
      }
    }
    tools.shape("rect", { class: "frame one", x: 1, y: p * cell, width: p * cell, height: (length - p) * cell - 1 }, picture.svg);
    const values = chosen.singular[p - 1], floor = 1e-16;
    const shown = values.slice(0, 16), logs = shown.map((v) => Math.log10(Math.max(v, floor)));
    const bars = tools.plot(tools.canvas, {
      width: width >= side + 240 ? width - side : width, height: 260, x: [0.4, 16.6], y: [-16.5, Math.ceil(Math.max(...logs)) + 0.5],
      xLabel: "singular value", title: "singular values (log₁₀)"
    });
    shown.forEach((_, i) => bars.line([i + 1, i + 1], [-16.5, logs[i]], "one"));
    bars.dots(shown.map((_, i) => i + 1), logs, "one", 4);
    const rank = values.filter((v) => v > values[0] * 1e-10).length;
    tools.say("rows from " + p + ", columns before " + p + ": " + (length - p) + " × " + p + " numbers, rank " + rank +
      (q ? ";  chunks of " + q + ": " + Math.ceil(length / q) + " diagonal blocks computed as attention, the rest through states" : ""));
  };
});
