// Distributions over the steps: quantiles as fans, and for one group of steps histograms and reward against length.

const QUANTITIES = [
  ["reward", "Reward", "reward"],
  ["thought", "Thought", "tokens"],
  ["response", "Response", "tokens"],
];

/** Curves of a fan: two bands around the median. */
function fan(distribution, name, colour) {
  const steps = distribution.steps.map(([first, last]) => Math.round((first + last) / 2));
  const known = steps.map((_, i) => i).filter((i) => distribution[name].quantiles[2][i] !== null);
  const pick = (values) => known.map((i) => values[i]);
  const [lowest, low, median, high, highest] = distribution[name].quantiles.map(pick);
  const x = pick(steps);
  return [
    { steps: x, values: median, low: lowest, high: highest, colour, label: "middle 90 %" },
    { steps: x, values: median, low, high, colour, label: "middle 50 %, median" },
  ];
}

/** Points of a drawing with margins: scales values to pixels. */
const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

/** Axis labels at both ends. */
function ends(low, high, width, height, left, bottom) {
  const y = height - 4;
  return [
    el("line", { x1: left, x2: width, y1: height - bottom, y2: height - bottom, class: "axis" }),
    el("text", { x: left, y, class: "tick" }, number(low)),
    el("text", { x: width, y, class: "tick end" }, number(high)),
  ];
}

/** A histogram as SVG. */
function histogram(quantity, index, colour, title, unit) {
  const width = 300, height = 130, bottom = 18;
  const counts = quantity.counts[index], top = Math.max(...counts, 1), total = counts.reduce((a, b) => a + b, 0);
  const bar = width / counts.length, y = scale(0, top, height - bottom, 6);
  const bars = counts.map((count, i) => el("rect", { x: i * bar + 0.5, width: bar - 1, y: y(count), height: height - bottom - y(count), fill: colour }, el("title", {}, `${number(quantity.edges[i])} to ${number(quantity.edges[i + 1])} ${unit}: ${count} of ${total}`)));
  return el("figure", { class: "small-chart" }, el("figcaption", {}, el("span", { class: "chart-title" }, title), el("span", { class: "unit" }, `${unit}, ${plural(total, "sample")}`)),
    el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${title.toLowerCase()}` }, bars, ends(quantity.edges[0], quantity.edges.at(-1), width, height, 0, bottom)));
}

/** Reward against response length as SVG. */
function scatter(distribution, index, colour) {
  const width = 300, height = 130, bottom = 18, left = 0;
  const all = distribution.points.flat();
  const span = (i) => [Math.min(...all.map((p) => p[i])), Math.max(...all.map((p) => p[i]))];
  const [x0, x1] = span(0), [y0, y1] = span(1), x = scale(x0, x1, left + 4, width - 4), y = scale(y0, y1, height - bottom - 4, 6);
  const dots = distribution.points[index].map(([length, reward]) => el("circle", { cx: x(length), cy: y(reward), r: 2.6, fill: colour, "fill-opacity": 0.55 }, el("title", {}, `${length} tokens, reward ${number(reward)}`)));
  return el("figure", { class: "small-chart" }, el("figcaption", {}, el("span", { class: "chart-title" }, "Reward against length"), el("span", { class: "unit" }, `reward ${number(y0)} to ${number(y1)}, by response tokens`)),
    el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Reward against response length" }, dots, ends(x0, x1, width, height, left, bottom)));
}

/** The section, for one run at a time. */
function distributionsSection(data) {
  const runs = data.runs.filter((run) => run.distributions);
  if (!runs.length) return;
  let run = runs[0], index = run.distributions.steps.length - 1;
  const details = el("div", { class: "grid small" });
  const at = el("output", {});
  const slider = el("input", { type: "range", min: "0", id: "distribution-step", oninput: () => ((index = Number(slider.value)), show()) });
  const colour = () => colourOf(data.runs.length > 1 ? data.runs.indexOf(run) : 0);
  const show = () => {
    const [first, last] = run.distributions.steps[index];
    at.textContent = first === last ? `step ${first}` : `steps ${first} to ${last}`;
    details.replaceChildren(...QUANTITIES.map(([name, title, unit]) => histogram(run.distributions[name], index, colour(), title, unit)), scatter(run.distributions, index, colour()));
  };
  const reset = () => {
    slider.max = String(run.distributions.steps.length - 1);
    index = run.distributions.steps.length - 1;
    slider.value = slider.max;
    show();
    charts.forEach((chart) => chart.figure.closest("#distributions") && chart.drawn && chart.draw());
  };
  const fans = QUANTITIES.map(([name, title, unit]) => makeChart({ title, unit, name: `distribution ${name}`, make: () => fan(run.distributions, name, colour()) }));
  const controls = el("div", { class: "controls" });
  if (runs.length > 1) controls.append(field("Run", select(runs.map((item, i) => [String(i), item.label]), (value) => ((run = runs[Number(value)]), reset()))));
  const node = section("distributions", "Distributions", "All rollouts of a run, not only those shown above.", controls, el("div", { class: "grid" }, ...fans),
    el("div", { class: "controls" }, field("Within", slider), at), details);
  if (!controls.children.length) controls.remove();
  theme.listeners.push(show);
  reset();
  return node;
}
