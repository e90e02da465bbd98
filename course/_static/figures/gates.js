/* The step size that a trained model chooses for every token of a text, per channel or as a mean, and what is left of
   a token's contribution later.

   data: tokens [texts], layers: [{name, steps [token][channel], decay [token][channel]}], channels [names] */
CourseFigures.register("gates", function (root, data, tools) {
  "use strict";
  const layer = tools.choice(tools.controls, { label: "layer", names: data.layers.map((l) => l.name), change: tools.redraw });
  const channel = tools.choice(tools.controls, { label: "channel", names: data.channels, change: tools.redraw });
  const token = tools.slider(tools.controls, {
    label: "token", min: 0, max: data.tokens.length - 1, value: Math.min(2, data.tokens.length - 1),
    format: (i) => "“" + data.tokens[i] + "”", change: tools.redraw
  });

  return function (width) {
    const chosen = data.layers[layer.value], c = channel.value, at = token.value;
    const steps = chosen.steps.map((row) => row[c]), decay = chosen.decay.map((row) => row[c]);
    const most = Math.max(...steps, 1e-9);
    const text = tools.element("div", { class: "tokens" }, tools.canvas);
    data.tokens.forEach((word, i) => {
      const box = tools.element("button", {
        type: "button", "aria-label": "token " + i + ": " + (word.trim() || "space"), class: "token" + (i === at ? " chosen" : ""), title: "Δ = " + tools.short(steps[i]), tabindex: "-1"
      }, text, word);
      box.style.background = tools.sequential(steps[i] / most * 0.75);
      box.addEventListener("click", () => { token.value = i; tools.redraw(); });
    });
    const x = [-0.6, data.tokens.length - 0.4], all = [...steps.keys()];
    const gate = tools.plot(tools.canvas, { width: width, height: 130, x: x, y: [0, most * 1.1], title: "step Δ of each token" });
    gate.bars(all, steps, (i) => i === at ? "two" : "one", 0.7);
    const left = [];
    let share = 1;
    for (let t = at; t < data.tokens.length; t++) { if (t > at) share *= decay[t]; left.push(share); }
    const rest = tools.plot(tools.canvas, { width: width, height: 130, x: x, y: [0, 1.05], title: "what is left of “" + data.tokens[at] + "”" });
    rest.bars(all.slice(at), left, "three", 0.7);
    tools.say("“" + data.tokens[at] + "”: Δ = " + tools.short(steps[at]) + "; at the end of the text " +
      (100 * left[left.length - 1]).toFixed(1) + "% of its contribution is left");
  };
});
