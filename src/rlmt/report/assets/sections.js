// The verdict at the head of the page, time by phase, tables of results, and the configuration.

/** First and last value of a metric, averaged over a few steps at either end. */
function change(run, names) {
  const metric = names.map((name) => run.metrics[name]).find(Boolean);
  if (!metric) return null;
  const values = metric[1], window = Math.min(values.length, Math.max(1, Math.floor(values.length / 10)));
  return [mean(values.slice(0, window)), mean(values.slice(-window))];
}

/** A number with its name. */
const tile = (label, value, detail) => el("div", { class: "tile" }, el("span", { class: "tile-label" }, label), el("span", { class: "tile-value" }, value), detail ? el("span", { class: "tile-detail" }, detail) : null);

/** The numbers that sum up a run. */
function tiles(run) {
  const shown = [];
  const arrow = (label, names, unit) => {
    const ends = change(run, names);
    if (ends && (ends[0] || ends[1])) shown.push(tile(label, `${number(ends[0])} → ${number(ends[1])}`, unit));
  };
  arrow("Reward, held-out prompts", ["val/reward_mean"], "first to last validation");
  arrow("Reward", ["reward/mean"], "first to last tenth of the steps");
  arrow("Thought", ["length/thought_mean"], "tokens");
  arrow("Response", ["length/response_mean"], "tokens");
  arrow("Loss", ["sft/loss", "rm/loss"], "nats");
  arrow("Held-out loss", ["val/loss"], "nats");
  const steps = run.metrics["time/step_s"];
  if (steps) shown.push(tile("Time", duration(steps[1].reduce((a, b) => a + b, 0)), `${number(mean(steps[1]))} s a step`));
  const tokens = run.metrics["perf/tokens_per_s"];
  if (tokens) shown.push(tile("Throughput", number(mean(tokens[1].slice(1).length ? tokens[1].slice(1) : tokens[1])), "tokens per second"));
  return shown;
}

/** `2 problems, 1 to watch, 6 ok`. */
function tally(verdicts) {
  const count = (state) => verdicts.filter((verdict) => verdict.state === state).length;
  const texts = [[count("problem"), (n) => plural(n, "problem")], [count("watch"), (n) => `${n} to watch`], [count("ok"), (n) => `${n} ok`], [count("unknown"), (n) => `${n} too early to judge`]];
  return texts.filter(([n]) => n).map(([n, text]) => text(n)).join(", ");
}

/** A small curve of the metric behind a verdict. */
function sparkline(series) {
  const [steps, all] = series, width = 220, height = 30, values = smooth(steps, all, steps.at(-1) / 40);
  const x = scale(steps[0], steps.at(-1), 2, width - 2), y = scale(Math.min(...values), Math.max(...values), height - 3, 3);
  const path = values.map((value, i) => `${i ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  return el("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", preserveAspectRatio: "none", "aria-hidden": "true" }, el("path", { d: path }));
}

/** Where the documentation explains a verdict: a link if the package names its site, else file and section in its source. */
function docsLink(data, anchor) {
  const [file, section] = anchor.split("#");
  if (!data.docs) return el("span", { class: "docs" }, `More: docs/${file} in rlmt's source, “${section.replaceAll("-", " ")}”`);
  return el("a", { class: "docs", href: `${data.docs.replace(/\/$/, "")}/${anchor.replace(".md", ".html")}` }, "More in the documentation");
}

/** One verdict: state, number, why it matters, what to try. */
function verdictCard(data, run, verdict) {
  const series = run.metrics[verdict.metric];
  const advice = verdict.state === "ok" ? null : el("p", {}, el("b", {}, "Try: "), ...prose(verdict.advice));
  const jump = () => {
    const chart = charts.find((item) => item.figure.dataset.metrics.split(" ").includes(verdict.metric));
    if (!chart) return;
    chart.figure.closest("details").open = true;
    chart.figure.scrollIntoView({ block: "center" });
    chart.figure.focus({ preventScroll: true });
  };
  return el("article", { class: `verdict ${verdict.state}`, "data-check": verdict.key },
    el("header", {}, el("h3", {}, verdict.title), badge(verdict.state)),
    el("div", { class: "reading" }, el("span", { class: "number" }, verdict.number), series && series[0].length > 1 ? sparkline(series) : null),
    el("p", {}, verdict.why), advice,
    el("details", {}, el("summary", {}, "Thresholds"), el("p", {}, verdict.limits), verdict.state === "ok" ? el("p", {}, ...prose(`If it leaves them: ${verdict.advice}`)) : null, docsLink(data, verdict.anchor)),
    el("button", { type: "button", class: "quiet jump", onclick: jump }, "Show the curve"));
}

/** Headline of a run's verdict. */
function headline(run) {
  const words = { ok: "Looks healthy", watch: "Needs a look", problem: "Has a problem", unknown: "Too early to judge" };
  const names = run.verdicts.filter((v) => v.state === "problem" || v.state === "watch").sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state)).map((v) => v.title.toLowerCase());
  const progress = run.planned > 0 ? `step ${run.steps.toLocaleString("en")} of ${run.planned.toLocaleString("en")}` : plural(run.steps, "step");
  const state = run.state === "unknown" ? "" : ` · ${run.state}`;
  return el("div", { class: `headline ${run.verdict}` }, el("span", { class: "big-icon", "aria-hidden": "true" }, STATES[run.verdict].icon),
    el("div", {}, el("p", { class: "headline-title" }, words[run.verdict]), el("p", {}, tally(run.verdicts) + (names.length ? `: ${names.join(", ")}` : ""))),
    el("p", { class: "progress" }, `${progress}${state}`));
}

/** The verdict: one run in full, several as a matrix with the details of one. */
function verdictSection(data) {
  const node = section("verdict", "Verdict", "");
  const details = el("div", {});
  const show = (run) => {
    const sorted = [...run.verdicts].sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state));
    details.replaceChildren(headline(run), el("div", { class: "tiles" }, ...tiles(run)), el("div", { class: "verdicts" }, ...sorted.map((verdict) => verdictCard(data, run, verdict))));
  };
  if (data.runs.length > 1) {
    const titles = new Map(data.runs.flatMap((run) => run.verdicts.map((verdict) => [verdict.key, verdict.title])));
    const rows = [...titles].map(([key, title]) => [title, ...data.runs.map((run) => {
      const verdict = run.verdicts.find((item) => item.key === key);
      return verdict ? el("span", { class: "cell" }, badge(verdict.state), el("span", { class: "cell-number" }, verdict.number)) : "–";
    })]);
    const heads = data.runs.map((run) => el("button", { type: "button", class: "quiet run-head", onclick: () => (show(run), details.scrollIntoView({ block: "nearest" })) }, run.label, badge(run.verdict)));
    node.append(table(["", ...heads], rows, "Verdicts by run; press a run's name for its details.", "matrix"));
  }
  node.append(details);
  show(data.runs[0]);
}

/** Mean seconds of each phase of a step, one bar a run. */
function timeBars(data) {
  const phases = [["rollout", "generate"], ["sync", "sync weights"], ["reward", "score, log-probs"], ["update", "update"]];
  const rows = data.runs.map((run) => {
    const seconds = phases.map(([name]) => (run.metrics[`time/${name}_s`] ? mean(run.metrics[`time/${name}_s`][1].slice(1).length ? run.metrics[`time/${name}_s`][1].slice(1) : run.metrics[`time/${name}_s`][1]) : 0));
    return { run, seconds, total: seconds.reduce((a, b) => a + b, 0) };
  }).filter((row) => row.total);
  if (!rows.length) return;
  const longest = Math.max(...rows.map((row) => row.total));
  const bars = rows.map(({ run, seconds, total }) => el("div", { class: "time-row" }, data.runs.length > 1 ? el("span", { class: "run-name" }, run.label) : null,
    el("div", { class: "time-bar", role: "img", "aria-label": phases.map(([, label], i) => `${label} ${number(seconds[i])} s`).join(", ") }, ...seconds.map((value, i) => el("i", { class: `phase-${i}`, style: { width: `${(100 * value) / longest}%` }, title: `${phases[i][1]}: ${number(value)} s, ${Math.round((100 * value) / total)} %` }))),
    el("span", { class: "tokens" }, `${number(total)} s a step`)));
  const key = el("p", { class: "key" }, ...phases.map(([, label], i) => el("span", {}, el("i", { class: `dot phase-${i}` }), data.runs.length > 1 ? label : `${label} ${number(rows[0].seconds[i])} s`)));
  section("time", "Time", "Mean seconds of each phase of a step, without the first step, which starts the engine. Curves are above, under Time and Throughput.", key, ...bars);
}

/** Sections of texts, tables, pictures and examples: evaluations, comparisons, a study's results. */
function resultSections(data) {
  data.sections.forEach((item, i) => {
    const node = section(`results-${i}`, item.title, "");
    node.append(...item.texts.map((text) => el("p", { class: "lead" }, text)), ...item.tables.map((t) => table(t.columns, t.rows, t.caption)),
      ...item.pictures.map((picture) => el("img", { src: picture.src, alt: picture.alt })), ...item.examples.map(example));
    node.classList.add("results");
  });
}

/** An example to read, folded. */
function example(item) {
  const parts = item.parts.flatMap(([label, text]) => [label ? el("h4", {}, label) : null, el("pre", {}, text)]);
  return el("details", { class: "example" }, el("summary", {}, item.title), ...parts);
}

/** A command line with a button that copies it. */
function commandLine(command) {
  const button = el("button", { type: "button", class: "quiet", onclick: async () => {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
  } }, "Copy");
  return el("div", { class: "command" }, el("pre", {}, command), button);
}

/** Own settings, versions, command and all options. */
function configurationSection(data) {
  const node = section("configuration", "Configuration", "");
  if (data.runs.length > 1) {
    const { runs, rows } = data.differences;
    node.append(el("h3", {}, "What differs between the runs"), rows.length ? table(["option", ...runs], rows, "") : el("p", { class: "lead" }, "No option differs."));
  }
  for (const run of data.runs) {
    const parts = [];
    if (run.command) parts.push(el("h4", {}, "Command"), commandLine(run.command));
    if (run.settings.length) parts.push(el("h4", {}, "What differs from the shipped configs"), table(["option", "shipped", "this run"], run.settings, ""));
    parts.push(el("h4", {}, "Run"), table(["", ""], run.facts, "", "facts"));
    if (run.config) parts.push(el("details", {}, el("summary", {}, "Every option"), el("pre", { class: "whole" }, run.config)));
    if (data.runs.length === 1) node.append(...parts);
    else node.append(el("details", { class: "family" }, el("summary", {}, run.label), ...parts));
  }
}
