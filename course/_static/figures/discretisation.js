/* One continuous system, sampled with a step that the reader chooses, by several rules.

   data: time [], exact [] (the continuous solution), end, steps [] (the steps to choose from),
   rules: [{name, poles: [[re, im] per step], samples: [[values] per step]}], low, high (of the signal) */
CourseFigures.register("discretisation", function (root, data, tools) {
  "use strict";
  const kinds = ["one", "two", "three", "four"];
  const step = tools.slider(tools.controls, {
    label: "step Δ", min: 0, max: data.steps.length - 1, value: data.start,
    format: (i) => data.steps[i].toFixed(3) + " s", change: tools.redraw
  });
  tools.legend(tools.controls, [["plain", "continuous"], ...data.rules.map((rule, i) => [kinds[i], rule.name])]);

  return function (width) {
    const i = step.value, dt = data.steps[i];
    const wide = width >= 640, left = wide ? Math.round(width * 0.64) : width;
    const signal = tools.plot(tools.canvas, {
      width: left, height: 260, x: [0, data.end], y: [data.low, data.high], xLabel: "time (s)", title: "state h(t)"
    });
    signal.line(data.time, data.exact, "plain");
    data.rules.forEach((rule, r) => {
      const times = rule.samples[i].map((_, t) => t * dt);
      signal.line(times, rule.samples[i], kinds[r] + " thin");
      signal.dots(times, rule.samples[i], kinds[r], 3);
    });
    const side = wide ? width - left : Math.min(width, 300), reach = 1.6;
    const tall = 260, half = reach * (side - 56) / (tall - 62);
    const plane = tools.plot(tools.canvas, {
      width: side, height: tall, x: [-half, half], y: [-reach, reach], xLabel: "real part", title: "Ā in the complex plane"
    });
    const circle = [...Array(73).keys()].map((k) => k * Math.PI / 36);
    plane.line(circle.map(Math.cos), circle.map(Math.sin), "plain");
    data.rules.forEach((rule, r) => {
      const [re, im] = rule.poles[i];
      plane.dots([re, re], [im, -im], kinds[r], 5);
    });
    const size = (rule) => Math.hypot(rule.poles[i][0], rule.poles[i][1]);
    tools.say(data.rules.map((rule) =>
      rule.name + ": |Ā| = " + size(rule).toFixed(3) + (size(rule) >= 1 ? " (grows without bound)" : "")).join(";  "));
  };
});
