/* The same output twice: by the recurrence, which holds a state, and by the kernel laid over the past.

   data: u [], kernel [], states [[per token]], y [] */
CourseFigures.register("convolution", function (root, data, tools) {
  "use strict";
  const length = data.u.length;
  const most = (values) => Math.max(...values.map(Math.abs)) * 1.1;
  const token = tools.slider(tools.controls, {
    label: "token t", min: 0, max: length - 1, value: Math.floor(length / 2), change: tools.redraw
  });
  tools.legend(tools.controls, [["plain", "input u"], ["one", "kernel, reversed, ending at t"], ["two", "their products"], ["three", "state and output"]]);

  return function (width) {
    const t = token.value, all = [...data.u.keys()], past = all.slice(0, t + 1);
    const laid = past.map((s) => data.kernel[t - s]);
    const products = past.map((s) => data.kernel[t - s] * data.u[s]);
    const x = [-0.6, length - 0.4];
    const top = Math.max(most(data.u), most(data.kernel));
    const seen = tools.plot(tools.canvas, { width: width, height: 150, x: x, y: [-top, top], title: "the kernel over the inputs so far" });
    seen.bars(all, data.u, (s) => s <= t ? "plain" : "plain faint", 0.5);
    seen.line(past, laid, "one");
    seen.dots(past, laid, "one", 3);
    const sum = products.reduce((a, b) => a + b, 0);
    const high = Math.max(most(data.u.map((u, s) => u * data.kernel[0])), most(data.y), 1e-9);
    const made = tools.plot(tools.canvas, { width: width, height: 120, x: x, y: [-high, high], title: "products: their sum is the output" });
    made.bars(past, products, "two", 0.5);
    const half = width >= 560 ? Math.floor(width / 3) : width;
    const state = data.states[t], limit = most(data.states.flat());
    const held = tools.plot(tools.canvas, {
      width: half, height: 150, x: [-0.6, state.length - 0.4], y: [-limit, limit], title: "the state h after token t"
    });
    held.bars([...state.keys()], state, "three", 0.6);
    const out = tools.plot(tools.canvas, {
      width: width >= 560 ? width - half : width, height: 150, x: x, y: [-most(data.y), most(data.y)], title: "output y"
    });
    out.stems(past, past.map((s) => data.y[s]), "three");
    tools.say("t = " + t + ": sum of the " + (t + 1) + " products = " + sum.toFixed(4) +
      ";  read from the state of " + state.length + " numbers: C h = " + data.y[t].toFixed(4));
  };
});
