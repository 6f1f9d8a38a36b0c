// The curves: one uPlot chart a panel, drawn when it scrolls into view, with shared cursor, zoom, smoothing and legend.

const charts = []; // every chart of the page, drawn or not
const view = { smoothing: 0.025, raw: true, against: "", zoom: null, last: 1 };
const FEW = 12; // points up to which a curve is not smoothed and its points are marked

/** Smooths values with a Gaussian kernel, which has no lag; `width` is its standard deviation in steps. */
function smooth(steps, values, width) {
  if (!width || values.length <= FEW) return values;
  let from = 0;
  return values.map((_, i) => {
    while (steps[from] < steps[i] - 4 * width) from++;
    let sum = 0, total = 0;
    for (let j = from; j < steps.length && steps[j] <= steps[i] + 4 * width; j++) {
      const weight = Math.exp(-0.5 * ((steps[j] - steps[i]) / width) ** 2);
      sum += weight * values[j];
      total += weight;
    }
    return sum / total;
  });
}

/** Combines seeds at the steps that all of them have: mean, lowest and highest. */
function combine(seeds) {
  if (seeds.length === 1) return { steps: seeds[0][0], values: seeds[0][1] };
  const at = seeds.map(([steps, values]) => new Map(steps.map((step, i) => [step, values[i]])));
  const steps = seeds[0][0].filter((step) => at.every((map) => map.has(step)));
  const columns = steps.map((step) => at.map((map) => map.get(step)));
  return {
    steps,
    values: columns.map(mean),
    low: columns.map((column) => Math.min(...column)),
    high: columns.map((column) => Math.max(...column)),
  };
}

/** Differences of two series at the steps that both have. */
function minus([steps, values], [otherSteps, otherValues]) {
  const other = new Map(otherSteps.map((step, i) => [step, otherValues[i]]));
  const kept = steps.map((_, i) => i).filter((i) => other.has(steps[i]));
  return [kept.map((i) => steps[i]), kept.map((i) => values[i] - other.get(steps[i]))];
}

/** The curves of a panel: one for each metric and arm, or their differences from the arm `view.against`. */
function curvesOf(panel, data) {
  const arms = [...new Set(data.runs.map((run) => run.arm))];
  const curves = [];
  panel.lines.forEach((line, lineIndex) => {
    const of = (arm) => data.runs.filter((run) => run.arm === arm && run.metrics[line.metric]);
    arms.forEach((arm, armIndex) => {
      if (arm === view.against) return;
      let seeds = of(arm).map((run) => run.metrics[line.metric]);
      if (view.against) {
        // Seeds are compared in pairs; arms without common seeds by their means.
        const pairs = of(arm).map((run) => [run, of(view.against).find((other) => other.seed === run.seed)]);
        seeds = pairs.filter(([, other]) => other).map(([run, other]) => minus(run.metrics[line.metric], other.metrics[line.metric]));
        if (!seeds.length && of(arm).length && of(view.against).length) {
          const [a, b] = [arm, view.against].map((name) => combine(of(name).map((run) => run.metrics[line.metric])));
          seeds = [minus([a.steps, a.values], [b.steps, b.values])];
        }
      }
      const combined = seeds.length ? combine(seeds) : null;
      if (!combined || !combined.steps.length) return;
      const many = arms.length > 1;
      const colour = colourOf(many ? armIndex : lineIndex);
      const name = !many ? line.label : panel.lines.length > 1 ? `${arm}, ${line.label}` : arm;
      const dash = many && lineIndex ? [[7, 4], [2, 3], [10, 3, 2, 3]][(lineIndex - 1) % 3] : undefined;
      curves.push({ ...combined, colour, dash, label: view.against ? `${name} − ${view.against}` : name });
    });
  });
  return curves;
}

/** Data, series and bands of uPlot; each curve knows the numbers of its series. */
function plotted(curves) {
  const tables = [], series = [{}], bands = [];
  for (const curve of curves) {
    const width = view.smoothing * view.last, few = curve.steps.length <= FEW;
    const line = smooth(curve.steps, curve.values, width);
    const columns = [line];
    curve.main = series.length;
    curve.indices = [series.length];
    series.push({ stroke: curve.colour, width: 2, dash: curve.dash, spanGaps: true, points: { show: few, size: 6, fill: curve.colour } });
    const add = (values, options) => {
      columns.push(values);
      curve.indices.push(series.length);
      series.push({ spanGaps: true, points: { show: false }, ...options });
    };
    if (curve.low) {
      add(smooth(curve.steps, curve.high, width), { width: 0 });
      add(smooth(curve.steps, curve.low, width), { width: 0 });
      bands.push({ series: [curve.main + 1, curve.main + 2], fill: faint(curve.colour, 0.16) });
    } else if (view.raw && width && !few) {
      const dots = { show: true, size: curve.steps.length > 200 ? 2.5 : 4, width: 0, fill: faint(curve.colour, 0.38) };
      add(curve.values, { paths: () => null, points: dots });
    }
    tables.push([curve.steps, ...columns]);
  }
  return { data: uPlot.join(tables), series, bands };
}

/** Draws the thresholds of the panel's verdict where they are in range; among differences, the line of no difference. */
function drawLimits(u, panel) {
  const limits = view.against ? [["", 0, "--muted"]] : ["watch", "problem"].map((state) => [state, panel[state], `--${state}`]);
  for (const [state, limit, colour] of limits) {
    const { min, max } = u.scales.y;
    if (limit === null || limit < min || limit > max) continue;
    const y = Math.round(u.valToPos(limit, "y", true)) + 0.5;
    u.ctx.save();
    u.ctx.strokeStyle = u.ctx.fillStyle = css(colour);
    u.ctx.setLineDash([4, 4]);
    u.ctx.beginPath();
    u.ctx.moveTo(u.bbox.left, y);
    u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
    u.ctx.stroke();
    u.ctx.font = `${10 * devicePixelRatio}px system-ui, sans-serif`;
    u.ctx.textAlign = "right";
    u.ctx.textBaseline = "bottom";
    u.ctx.fillText(state, u.bbox.left + u.bbox.width - 4, y - 2);
    u.ctx.restore();
  }
}

/** Shows the same steps in all charts; null shows all. */
function zoomTo(range) {
  view.zoom = range;
  for (const chart of charts) if (chart.plot) chart.plot.setScale("x", bounds());
  document.getElementById("reset").disabled = !range;
}
const bounds = () => (view.zoom ? { min: view.zoom[0], max: view.zoom[1] } : { min: 0, max: Math.max(1, view.last) });

const axisStyle = () => ({
  stroke: css("--muted"),
  font: "11px system-ui, sans-serif",
  grid: { stroke: css("--grid"), width: 1 },
  ticks: { show: false },
  border: { show: false },
});

/** Range of the values: from 0 for quantities that cannot be negative, with room above; never of width 0. */
function valueRange(unit, low, high) {
  if (low === null) return [0, 1];
  const room = 0.08 * (high - low) || Math.abs(high) * 0.2 || 0.05;
  const start = low >= 0 && !view.against && /^(share|tokens|seconds|GiB|nats per token|prompts)/.test(unit) ? 0 : low - room;
  return [start, unit.startsWith("share") && high <= 1 ? Math.min(high + room, 1.02) : high + room];
}

/** Options of uPlot that all charts share. */
function plotOptions(width, height, unit) {
  return {
    width,
    height,
    legend: { show: false },
    padding: [10, 8, 0, 0],
    scales: { x: { time: false, range: () => [bounds().min, bounds().max] }, y: { range: (u, low, high) => valueRange(unit, low, high) } },
    axes: [
      { ...axisStyle(), size: 22, gap: 4, label: "step", labelSize: 16, labelGap: -2, labelFont: "11px system-ui, sans-serif", space: 60 },
      { ...axisStyle(), size: (u, values) => 16 + 6.4 * Math.max(3, ...(values || []).map((value) => String(value).length)), space: 34, values: (u, ticks) => ticks.map(number) },
    ],
  };
}

/** One chart with title, unit and legend; `curves` are made anew at each drawing, since colours and modes change. */
function makeChart({ title, unit, name, limits = {}, make, height = 210 }) {
  const host = el("div", { class: "plot", style: { "min-height": `${height}px` } });
  const legend = el("div", { class: "legend" });
  const heading = el("figcaption", {}, el("span", { class: "chart-title" }, title), el("span", { class: "unit" }, unit));
  const figure = el("figure", { class: "chart", "data-metrics": name, tabindex: "0", role: "group" }, heading, legend, host);
  const chart = { figure, host, plot: null, curves: [], hidden: new Set(), drawn: false };

  // Labels have the values themselves, also where the lines are smoothed.
  const showValues = (u) => {
    const at = u ? u.cursor.idx : null, none = at === null || at === undefined;
    const step = none ? Infinity : chart.plot.data[0][at];
    chart.curves.forEach((curve, i) => {
      const index = curve.steps.findLastIndex((other) => other <= step);
      legend.children[i].querySelector("b").textContent = number(curve.values[index]);
    });
    figure.dataset.step = none ? "" : step;
  };

  chart.draw = () => {
    chart.plot?.destroy();
    chart.drawn = true;
    chart.curves = make();
    legend.replaceChildren();
    if (!chart.curves.length) {
      host.replaceChildren(el("p", { class: "empty" }, "Nothing to compare here."));
      chart.plot = null;
      return;
    }
    host.replaceChildren();
    const { data, series, bands } = plotted(chart.curves);
    const options = plotOptions(host.clientWidth || 380, height, unit);
    chart.plot = new uPlot({
      ...options,
      series,
      bands,
      cursor: {
        sync: { key: "steps", setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        drag: { x: true, y: false, setScale: false },
        points: { size: 7 },
        bind: { dblclick: () => () => zoomTo(null) },
      },
      hooks: {
        setCursor: [showValues],
        draw: [(u) => drawLimits(u, { watch: null, problem: null, ...limits })],
        setSelect: [(u) => {
          if (u.select.width < 5) return;
          zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
      },
    }, data, host);
    for (const curve of chart.curves) legend.append(chip(curve));
    showValues(null);
    const ends = chart.curves.map((c) => `${c.label}: ${number(c.values[0])} at step ${c.steps[0]}, ${number(c.values.at(-1))} at step ${c.steps.at(-1)}`);
    figure.setAttribute("aria-label", `${title}, ${unit}. ${ends.join("; ")}. Arrow keys move the cursor, plus and minus zoom.`);
  };

  const chip = (curve) => {
    const show = () => curve.indices.forEach((i) => chart.plot.setSeries(i, { show: !chart.hidden.has(curve.label) }));
    const button = el("button", { type: "button", class: "chip", "aria-pressed": String(!chart.hidden.has(curve.label)), onclick: () => {
      chart.hidden.has(curve.label) ? chart.hidden.delete(curve.label) : chart.hidden.add(curve.label);
      button.setAttribute("aria-pressed", String(!chart.hidden.has(curve.label)));
      show();
    } }, el("span", { class: `swatch${curve.dash ? " dashed" : ""}`, style: { "--swatch": curve.colour } }), curve.label, " ", el("b", {}));
    if (chart.hidden.has(curve.label)) show();
    return button;
  };

  figure.addEventListener("keydown", (event) => {
    if (!chart.plot || event.target !== figure) return;
    const { min, max } = bounds(), centre = chart.plot.cursor.left >= 0 ? chart.plot.posToVal(chart.plot.cursor.left, "x") : (min + max) / 2;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
    if (move) {
      const steps = chart.plot.data[0], from = chart.plot.cursor.idx ?? (move > 0 ? -1 : steps.length);
      const next = Math.min(steps.length - 1, Math.max(0, from + move));
      chart.plot.setCursor({ left: chart.plot.valToPos(steps[next], "x"), top: height / 3 }, true, true);
    } else if (factor) {
      const half = ((max - min) * factor) / 2;
      const range = [Math.max(0, centre - half), Math.min(view.last, centre + half)];
      zoomTo(range[1] - range[0] >= view.last ? null : range);
    } else if (event.key === "Escape" || event.key === "0") zoomTo(null);
    else return;
    event.preventDefault();
  });
  charts.push(chart);
  whenVisible.observe(figure);
  return figure;
}

const whenVisible = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    const chart = charts.find((item) => item.figure === entry.target);
    if (!chart.drawn) chart.draw();
  }
}, { rootMargin: "300px" });

/** Draws the charts again that are drawn, after a change of smoothing, mode, colours or width. */
const redraw = () => charts.forEach((chart) => chart.drawn && chart.draw());
/** Draws all charts, for printing. */
const drawAll = () => charts.forEach((chart) => chart.drawn || chart.draw());

/** The section with all panels, by family, below one row of controls. */
function curvesSection(data) {
  view.last = Math.max(1, ...data.runs.flatMap((run) => Object.values(run.metrics).map(([steps]) => steps.at(-1))));
  const arms = [...new Set(data.runs.map((run) => run.arm))];
  const shown = el("output", {}, "");
  const range = el("input", { type: "range", min: "0", max: "0.1", step: "0.005", value: String(view.smoothing), id: "smoothing", oninput: () => {
    view.smoothing = Number(range.value);
    label();
    redraw();
  } });
  const label = () => (shown.textContent = view.smoothing ? `± ${number(Math.max(1, view.smoothing * view.last))} steps` : "off");
  label();
  const raw = el("input", { type: "checkbox", checked: true, id: "raw", onchange: () => ((view.raw = raw.checked), redraw()) });
  const controls = el("div", { class: "controls", role: "group", "aria-label": "Curves" }, field("Smoothing", range), shown,
    el("label", { class: "field" }, raw, el("span", {}, "each step")));
  if (arms.length > 1) {
    const options = [["", "values"], ...arms.map((arm) => [arm, `difference from ${arm}`])];
    const mode = select(options, (value) => ((view.against = value), redraw()));
    mode.id = "mode";
    controls.append(field("Show", mode));
  }
  controls.append(el("button", { type: "button", id: "reset", disabled: true, onclick: () => zoomTo(null) }, "Reset zoom"),
    el("span", { class: "hint" }, "Drag to zoom, double-click to reset; click a label to hide its curve."));
  const seeds = data.runs.length > arms.length ? " Lines are means over seeds, bands their range." : "";
  const node = section("curves", "Curves", `Lines are smoothed, dots are single steps; dashed lines are thresholds.${seeds}`, controls);
  const families = new Map();
  for (const panel of data.panels) families.set(panel.family, [...(families.get(panel.family) || []), panel]);
  for (const [family, panels] of families) {
    const grid = el("div", { class: "grid" }, ...panels.map((panel) => makeChart({
      title: panel.title, unit: panel.unit, name: panel.lines.map((line) => line.metric).join(" "), limits: panel, make: () => curvesOf(panel, data),
    })));
    const open = !["time", "perf", "engine"].includes(family) || families.size < 4;
    node.append(el("details", { class: "family", open, id: `family-${family}` }, el("summary", {}, data.families[family] || family, el("span", { class: "count" }, plural(panels.length, "chart"))), grid));
  }
  new ResizeObserver(debounced(redraw)).observe(node);
  theme.listeners.push(redraw);
}

/** Calls a function once, a little after the last of several events, and not for the first. */
function debounced(call) {
  let timer = null, width = null;
  return ([entry]) => {
    if (width !== null && width !== entry.contentRect.width) {
      clearTimeout(timer);
      timer = setTimeout(call, 120);
    }
    width = entry.contentRect.width;
  };
}
