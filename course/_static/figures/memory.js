/* What a model has to remember per sequence, against the length of the context.

   data: lengths [], models: [{name, bytes [per length], weights}], card (bytes of a GPU) */
CourseFigures.register("memory", function (root, data, tools) {
  "use strict";
  const kinds = ["one", "two", "three", "four", "plain"];
  const at = tools.slider(tools.controls, {
    label: "context", min: 0, max: data.lengths.length - 1, value: data.start,
    format: (i) => data.lengths[i].toLocaleString("en") + " tokens", change: tools.redraw
  });
  const batch = tools.slider(tools.controls, {
    label: "sequences", min: 0, max: 8, value: 0, format: (i) => String(Math.pow(2, i)), change: tools.redraw
  });
  tools.legend(tools.controls, data.models.map((m, i) => [kinds[i], m.name]));
  const words = (bytes) => {
    for (const [unit, size] of [["GiB", 1073741824], ["MiB", 1048576], ["KiB", 1024]]) {
      if (bytes >= size) return (bytes / size).toPrecision(3) + " " + unit;
    }
    return bytes + " B";
  };

  return function (width) {
    const i = at.value, rows = Math.pow(2, batch.value), logs = data.lengths.map(Math.log2);
    const high = Math.max(...data.models.flatMap((m) => m.bytes)) * rows;
    const picture = tools.plot(tools.canvas, {
      width: width, height: 280, x: [logs[0], logs[logs.length - 1]], y: [20, Math.log2(Math.max(high, data.card)) + 1],
      xLabel: "context, powers of two", title: "bytes to remember, powers of two"
    });
    picture.line([logs[0], logs[logs.length - 1]], [Math.log2(data.card), Math.log2(data.card)], "plain thin");
    picture.text(logs[0] + 0.2, Math.log2(data.card) + 0.4, "a GPU of " + words(data.card));
    data.models.forEach((model, k) => {
      const values = model.bytes.map((b) => Math.log2(b * rows));
      picture.line(logs, values, kinds[k]);
      picture.dots([logs[i]], [values[i]], kinds[k], 5);
    });
    tools.say(data.models.map((m) => m.name + ": " + words(m.bytes[i] * rows)).join(";  "));
  };
});
