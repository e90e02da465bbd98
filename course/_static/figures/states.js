/* The hidden state of a model over a sentence, a row per state and a column per token.

   data: tokens [texts], layers: [{name, states [row][token], rows [names], limit}] */
CourseFigures.register("states", function (root, data, tools) {
  "use strict";
  const layer = tools.choice(tools.controls, { label: "layer", names: data.layers.map((l) => l.name), change: tools.redraw });
  const token = tools.slider(tools.controls, {
    label: "token", min: 0, max: data.tokens.length - 1, value: 0, format: (i) => "“" + data.tokens[i] + "”", change: tools.redraw
  });
  const row = tools.slider(tools.controls, {
    label: "state", min: 0, max: data.layers[0].states.length - 1, value: 0, format: (i) => data.layers[0].rows[i], change: tools.redraw
  });

  return function (width) {
    const chosen = data.layers[layer.value], at = token.value, which = Math.min(row.value, chosen.states.length - 1);
    const tall = Math.max(4, Math.min(12, 260 / chosen.states.length));
    const picture = tools.heat(tools.canvas, {
      values: chosen.states, width: width, left: 46, top: 4, tall: tall, title: "states over the tokens",
      color: (v) => tools.diverging(v, chosen.limit)
    });
    const height = picture.top + chosen.states.length * tall;
    tools.shape("rect", { class: "frame two", x: picture.left + at * picture.cell, y: picture.top, width: picture.cell, height: height - picture.top }, picture.svg);
    tools.shape("rect", { class: "frame one", x: picture.left, y: picture.top + which * tall, width: width - picture.left, height: tall }, picture.svg);
    const values = chosen.states[which], limit = Math.max(...values.map(Math.abs), 1e-9) * 1.1;
    const curve = tools.plot(tools.canvas, {
      width: width, height: 140, x: [-0.5, data.tokens.length - 0.5], y: [-limit, limit], title: chosen.rows[which] + " over the text"
    });
    curve.steps([...values.keys()], values, "one");
    curve.dots([at], [values[at]], "two", 5);
    const text = tools.element("div", { class: "tokens" }, tools.canvas);
    data.tokens.forEach((word, i) => {
      const box = tools.element("button", { type: "button", "aria-label": "token " + i + ": " + (word.trim() || "space"), class: "token" + (i === at ? " chosen" : ""), tabindex: "-1" }, text, word);
      box.style.background = tools.diverging(values[i], limit);
      box.addEventListener("click", () => { token.value = i; tools.redraw(); });
    });
    tools.say(chosen.rows[which] + " after “" + data.tokens[at] + "”: " + tools.short(values[at]));
  };
});
