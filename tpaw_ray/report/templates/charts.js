"use strict";
// The charts, drawn with Plotly in the page's own colours, and drawn again when the theme changes.
(() => {
  const drawn = JSON.parse(document.getElementById("drawn").textContent);
  const places = [...document.querySelectorAll("[data-chart]")];
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;

  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  const channels = (rgb) => rgb.match(/[\d.]+/g).slice(0, 3).map(Number);
  function between(from, to, share) {
    const [a, b] = [channels(colour(from)), channels(colour(to))];
    return `rgb(${a.map((value, index) => Math.round(value + (b[index] - value) * share)).join(",")})`;
  }
  const faint = (rgb, opacity) => `rgba(${channels(rgb).join(",")},${opacity})`;
  // Plotly reads tags and entities in names; ours are text.
  const text = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const padded = (number) => String(number).padStart(3, "0");

  function layout(more = {}) {
    const axis = { gridcolor: colour("hairline"), linecolor: colour("line"), zerolinecolor: colour("line"), zerolinewidth: 1.5,
      tickcolor: colour("line"), automargin: true, ticks: "", title: { standoff: 8 } };
    const { xaxis, yaxis, ...rest } = more;
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("quiet") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 26, b: 8 },
      hovermode: "x unified", dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      hoverlabel: { bgcolor: colour("sheet"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 } },
      showlegend: false,
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }

  // Steps.

  const curves = drawn.curves;
  const parts = () => curves.iterations.map(([iteration, first], index) =>
    ({ iteration, first, end: index + 1 < curves.iterations.length ? curves.iterations[index + 1][1] : curves.last }));

  function runningMean(values) {
    const mean = values.map(() => null);
    for (const { first, end } of parts()) {
      const inside = curves.steps.flatMap((step, index) => (step >= first && step < end ? [index] : []));
      const reach = Math.max(1, Math.round(inside.length / 24));
      for (let place = 0; place < inside.length; place++) {
        const near = inside.slice(Math.max(0, place - reach), place + reach + 1).map((index) => values[index]).filter((value) => value !== null);
        if (values[inside[place]] !== null && near.length) mean[inside[place]] = near.reduce((sum, value) => sum + value, 0) / near.length;
      }
    }
    return mean;
  }

  // A null at the start of each iteration, so that no line leads from one to the next.
  function parted(values) {
    const cut = new Set(curves.iterations.slice(1).map(([, first]) => first));
    const x = [], y = [];
    values.forEach((value, index) => {
      if (cut.has(curves.steps[index])) { x.push(curves.steps[index]); y.push(null); }
      x.push(curves.steps[index]); y.push(value);
    });
    return { x, y };
  }

  function line(name, values, rgb, form) {
    const common = { type: "scatter", mode: "lines", legendgroup: name };
    return [
      { ...common, ...parted(values), line: { color: faint(rgb, 0.28), width: 1 }, showlegend: false, hoverinfo: "skip" },
      { ...common, ...parted(runningMean(values)), name: text(name), meta: name, line: { color: rgb, width: 2.2 }, hovertemplate: `%{y:${form}}` },
    ];
  }

  function stepLayout(place, more = {}) {
    const shown = parts();
    const wide = place.clientWidth / Math.max(1, shown.length) > 90;
    const few = place.clientWidth / Math.max(1, shown.length) > 14;
    return layout({
      shapes: shown.slice(1).map(({ first }) => ({ type: "line", x0: first, x1: first, yref: "paper", y0: 0, y1: 1, layer: "below",
        line: { color: colour("quiet"), width: 1, dash: "dot" } })),
      annotations: few ? shown.map(({ iteration, first, end }) => ({ x: (first + end) / 2, y: 1, yref: "paper", yanchor: "bottom", showarrow: false,
        text: wide ? `iteration ${iteration}` : `${iteration}`, font: { size: 10.5, color: colour("quiet") } })) : [],
      ...more,
      xaxis: { title: { text: "step", standoff: 6 }, range: [0, Math.max(1, curves.last)], showgrid: false, zeroline: false, ...more.xaxis },
    });
  }

  const measured = (column) => curves.values[column].some((value) => value !== null);

  const steps = (columns, more) => (place) => {
    const named = columns.filter(([, column]) => measured(column));
    return named.length === 0 ? null : [named.flatMap(([name, column, variable, form]) => line(name, curves.values[column], colour(variable), form)),
      stepLayout(place, more)];
  };

  function beta(place) {
    const players = Object.keys(curves.player_weights);
    if (!players.length) return null;
    return [players.flatMap((player, index) => line(`player ${padded(player)}`, curves.player_weights[player],
      between("old", "new", players.length > 1 ? index / (players.length - 1) : 1), ".3f")), stepLayout(place)];
  }

  // Checkpoints.

  function byCheckpoint(values, rgb, more, yaxis) {
    const names = drawn.checkpoints.map(({ number }) => padded(number));
    return [[{ type: "scatter", mode: "lines+markers", x: names, y: values, line: { color: rgb, width: 2.2 },
      marker: { size: 9, color: rgb, line: { width: 2, color: colour("sheet") } }, ...more }],
    layout({ xaxis: { type: "category", showgrid: false, title: { text: "checkpoint", standoff: 6 } }, yaxis, hovermode: "closest", margin: { l: 8, r: 12, t: 12, b: 8 } })];
  }

  function accuracy() {
    const values = drawn.checkpoints.map((one) => one.accuracy);
    if (values.every((value) => value === null)) return null;
    const error = (index) => drawn.checkpoints.map((one) => (one.interval ? Math.abs(one.interval[index] - one.accuracy) : 0));
    const said = drawn.checkpoints.map((one) => (one.interval ? one.interval.map((end) => `${(100 * end).toFixed(1)} %`).join(" to ") : ""));
    const rgb = colour("target");
    return byCheckpoint(values, rgb, { customdata: said, hovertemplate: "checkpoint %{x}<br>%{y:.1%}<br>%{customdata}<extra></extra>",
      error_y: { type: "data", symmetric: false, array: error(1), arrayminus: error(0), color: faint(rgb, 0.75), thickness: 1.5, width: 5 } },
    { tickformat: ".0%" });
  }

  function heldOutLogp() {
    const values = drawn.checkpoints.map((one) => one.target_logp);
    if (values.every((value) => value === null)) return null;
    return byCheckpoint(values, colour("gap"), { hovertemplate: "checkpoint %{x}<br>%{y:.3f} nats<extra></extra>" }, { title: { text: "nats", standoff: 4 } });
  }

  function time() {
    const names = drawn.checkpoints.map(({ number }) => `checkpoint ${padded(number)}`);
    const bar = (name, values, rgb) => ({ type: "bar", orientation: "h", y: names, x: values, name, meta: name, marker: { color: rgb, line: { width: 1, color: colour("sheet") } },
      hovertemplate: "%{x:.1f} s" });
    const worked = (stage) => drawn.checkpoints.map((one) => one.seconds[stage] - one.waited[stage]);
    const colours = [colour("generated"), colour("gap"), colour("target"), colour("fourth")];
    const waited = drawn.checkpoints.map((one) => Object.values(one.waited).reduce((sum, value) => sum + value, 0));
    return [[...drawn.stages.map((stage, index) => bar(stage, worked(stage), colours[index])), bar("waiting", waited, colour("wait"))],
      layout({ barmode: "stack", bargap: 0.35, hovermode: "y unified", yaxis: { autorange: "reversed", showgrid: false }, xaxis: { title: { text: "seconds", standoff: 6 } }, margin: { l: 8, r: 12, t: 8, b: 8 } })];
  }

  // Methods of an experiment.

  const HUES = ["target", "generated", "gap", "fourth", "good", "bad", "old", "new"];
  const DASHES = ["solid", "dash", "dot"];

  function band(column) {
    const shown = drawn.methods.map((method, index) => ({ name: method.method, found: method.bands[column], rgb: colour(HUES[index % HUES.length]),
      dash: DASHES[Math.floor(index / HUES.length) % DASHES.length] })).filter(({ found }) => found);
    if (!shown.length) return null;
    const checkpoints = column === "accuracy" || column === "held_out_logp";
    const share = column === "accuracy" || column === "target_weight_share";
    const traces = shown.flatMap(({ name, found, rgb, dash }) => {
      const reach = found.deviation.map((value) => value ?? 0);
      const up = found.mean.map((value, index) => value + reach[index]), down = found.mean.map((value, index) => value - reach[index]);
      return [
        { type: "scatter", mode: "lines", x: [...found.x, ...[...found.x].reverse()], y: [...up, ...down.reverse()], fill: "toself",
          fillcolor: faint(rgb, 0.13), line: { width: 0 }, hoverinfo: "skip" },
        { type: "scatter", mode: checkpoints ? "lines+markers" : "lines", x: found.x, y: found.mean, name: text(name), meta: name,
          line: { color: rgb, width: 2.2, dash }, marker: { size: 7, color: rgb }, hovertemplate: share ? "%{y:.1%}" : "%{y:.4g}" },
      ];
    });
    return [traces, layout({ margin: { l: 8, r: 12, t: 10, b: 8 }, yaxis: share ? { tickformat: ".0%" } : {},
      xaxis: { title: { text: checkpoints ? "checkpoint" : "step", standoff: 6 }, showgrid: false, zeroline: false, ...(checkpoints ? { dtick: 1 } : {}) } })];
  }

  const charts = {
    accuracy, held_out_logp: heldOutLogp, time, beta, band,
    rewards: steps([["target", "target_reward", "target", "+.4f"], ["generated", "generated_reward", "generated", "+.4f"]]),
    margin: steps([["margin", "margin", "gap", "+.4f"]]),
    alpha: steps([["share", "target_weight_share", "gap", ".1%"]], { yaxis: { tickformat: ".0%", rangemode: "tozero" } }),
    logps: steps([["target", "target_logp", "target", ".2f"], ["generated", "generated_logp", "generated", ".2f"]], { yaxis: { title: { text: "nats", standoff: 4 } } }),
    lengths: steps([["target", "target_length", "target", ".1f"], ["generated", "generated_length", "generated", ".1f"]], { yaxis: { title: { text: "tokens", standoff: 4 } } }),
    loss: steps([["loss", "loss", "gap", ".4f"]]),
    gradient: steps([["gradient norm", "grad_norm", "gap", ".3f"]], { yaxis: { rangemode: "tozero" } }),
  };

  function legend(place, named) {
    const item = (trace) => {
      const one = document.createElement("span");
      const swatch = one.appendChild(document.createElement("i"));
      swatch.style.background = trace.line ? trace.line.color : trace.marker.color;
      one.append(trace.meta);
      return one;
    };
    place.parentElement.querySelector(".legend").replaceChildren(...(named.length > 1 ? named.map(item) : []));
  }

  function draw() {
    for (const place of places) {
      const [name, column] = place.dataset.chart.split(":");
      const chart = charts[name](column ?? place);
      if (chart === null) {
        place.textContent = "Nothing of this kind was measured.";
        place.className = "chart empty";
        continue;
      }
      legend(place, chart[0].filter((trace) => trace.name));
      Plotly.react(place, chart[0], chart[1], { displayModeBar: false, responsive: true, showTips: false });
    }
  }

  unpacked("plotly").then((source) => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    draw();
    document.addEventListener("themechange", draw);
    document.documentElement.dataset.drawn = "yes";
  }).catch((error) => trouble("The charts", error));
})();
