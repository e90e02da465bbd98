/* A signal, and what a state of N numbers still knows of it at a moment that the reader chooses.

   data: time [], signal [], moments [index into time], sizes [N], memory [per size][per moment][values up to then],
   errors [per size][per moment] */
CourseFigures.register("hippo", function (root, data, tools) {
  "use strict";
  const size = tools.slider(tools.controls, {
    label: "state size N", min: 0, max: data.sizes.length - 1, value: data.start,
    format: (i) => String(data.sizes[i]), change: tools.redraw
  });
  const moment = tools.slider(tools.controls, {
    label: "now", min: 0, max: data.moments.length - 1, value: data.moments.length - 1,
    format: (i) => "t = " + tools.short(data.time[data.moments[i]]), change: tools.redraw
  });
  tools.legend(tools.controls, [["plain", "the signal"], ["one", "reconstructed from the state"]]);
  const low = Math.min(...data.signal), high = Math.max(...data.signal), room = 0.25 * (high - low);

  return function (width) {
    const n = size.value, m = moment.value, until = data.moments[m];
    const picture = tools.plot(tools.canvas, {
      width: width, height: 260, x: [data.time[0], data.time[data.time.length - 1]], y: [low - room, high + room],
      xLabel: "time", title: "what " + data.sizes[n] + " numbers remember"
    });
    picture.line(data.time.slice(until), data.signal.slice(until), "plain faint");
    picture.line(data.time.slice(0, until + 1), data.signal.slice(0, until + 1), "plain");
    const memory = data.memory[n][m];
    const times = memory.map((_, i) => data.time[0] + (data.time[until] - data.time[0]) * i / (memory.length - 1));
    picture.line(times, memory, "one");
    picture.line([data.time[until], data.time[until]], [low - room, high + room], "plain thin");
    tools.say(data.sizes[n] + " numbers at t = " + tools.short(data.time[until]) + ": root mean square error " +
      data.errors[n][m].toPrecision(2) + " of a signal with " + data.scale.toPrecision(2));
  };
});
