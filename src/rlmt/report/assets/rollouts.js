// The rollout browser: filters, samples with folded thoughts, and one prompt across steps and runs.

const KINDS = [
  ["", "all shown"],
  ["best", "highest reward"],
  ["worst", "lowest reward"],
  ["malformed", "malformed"],
  ["changed", "prompts that changed most"],
  ["sample", "random sample"],
];
const PAGE = 10;

/** The last turn of a prompt. */
const question = (prompt) => prompt.messages.at(-1)[1];

/** The rows of all runs, each with its run and prompt. */
const allRows = (data) => data.runs.flatMap((run) => (run.rollouts ? run.rollouts.rows : []).map((row) => ({ ...row, run, asked: run.rollouts.prompts[row.prompt] })));

/** Where a row comes from. */
const place = (row) => `step ${row.step}${row.held_out ? ", held-out prompt" : ""}`;

/** Thought and response lengths as two bars, relative to the longest sample. */
function lengthBar(row, longest) {
  const share = (tokens) => `${(100 * tokens) / longest}%`;
  return el("span", { class: "length-bar", title: `${row.thought_tokens} thought and ${row.response_tokens} response tokens` },
    el("i", { class: "thought", style: { width: share(row.thought_tokens) } }), el("i", { class: "response", style: { width: share(row.response_tokens) } }));
}

/** One sample, its thought folded. */
function sampleCard(row, range, longest, many, open = false) {
  const share = range[1] > range[0] && row.reward !== null ? (row.reward - range[0]) / (range[1] - range[0]) : 0;
  const parts = Object.entries(row.parts);
  const head = el("div", { class: "sample-head" },
    many ? el("span", { class: "run-name" }, row.run.label) : null,
    el("span", { class: "step" }, place(row)),
    el("span", { class: "reward", title: "Reward used for training" }, el("i", { style: { width: `${100 * share}%` } }), el("b", {}, number(row.reward))),
    row.status === "ok" ? null : el("span", { class: "badge problem" }, el("span", { class: "icon", "aria-hidden": "true" }, "✕"), row.status.replace("_", " ")),
    row.truncated ? el("span", { class: "badge watch" }, el("span", { class: "icon", "aria-hidden": "true" }, "!"), "truncated") : null,
    lengthBar(row, longest),
    el("span", { class: "tokens" }, `${row.thought_tokens} + ${row.response_tokens} tokens`),
    ...parts.map(([name, value]) => el("span", { class: "part" }, `${name} ${number(value)}`)));
  const thought = row.thought ? el("details", { class: "thought-box", open }, el("summary", {}, `Thought, ${plural(row.thought_tokens, "token")}`), el("pre", {}, row.thought)) : null;
  return el("article", { class: "sample" }, head,
    el("details", { class: "prompt-box" }, el("summary", {}, el("span", { class: "role" }, "prompt"), question(row.asked)), ...row.asked.messages.map(([role, text]) => el("div", { class: "turn" }, el("span", { class: "role" }, role), el("pre", {}, text)))),
    thought, el("pre", { class: "response-box" }, row.response || "(empty response)"));
}

/** The section; without rollouts it says where they come from. */
function rolloutsSection(data) {
  const rows = allRows(data);
  if (!rows.length) {
    section("rollouts", "Rollouts", "This run has no rollout files; SampleTable writes them (dump_every_n_steps).");
    return;
  }
  const total = data.runs.reduce((sum, run) => sum + (run.rollouts ? run.rollouts.total : 0), 0);
  const lead = `${rows.length.toLocaleString("en")} of ${plural(total, "rollout")}: a random sample spread over the steps, the best and worst, malformed ones, and prompts that are followed over the steps.`;
  const node = section("rollouts", "Rollouts", lead);
  const known = rows.map((row) => row.reward).filter((reward) => reward !== null);
  const range = [Math.min(...known), Math.max(...known)];
  const longest = Math.max(1, ...rows.map((row) => row.thought_tokens + row.response_tokens));
  const many = data.runs.length > 1;
  const filter = { run: "", kind: "", status: "", text: "", low: -Infinity, high: Infinity, first: 0, last: Infinity, order: "newest" };
  const list = el("div", { class: "samples" });
  const count = el("output", { class: "count", id: "rollout-count", "aria-live": "polite" });
  const more = el("button", { type: "button", onclick: () => fill(list.children.length + PAGE) }, "Show more");
  let unfolded = false;

  const matches = (row) => {
    const text = filter.text.toLowerCase();
    return (!filter.run || row.run.label === filter.run) && (!filter.kind || row.kinds.includes(filter.kind)) &&
      (!filter.status || (filter.status === "truncated" ? row.truncated : row.status === filter.status)) &&
      (row.reward === null ? filter.low === -Infinity && filter.high === Infinity : row.reward >= filter.low && row.reward <= filter.high) &&
      row.step >= filter.first && row.step <= filter.last &&
      (!text || [row.thought, row.response, ...row.asked.messages.map((m) => m[1])].some((part) => part.toLowerCase().includes(text)));
  };
  const orders = {
    step: (a, b) => a.step - b.step,
    newest: (a, b) => b.step - a.step,
    best: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
    worst: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
    thought: (a, b) => b.thought_tokens - a.thought_tokens,
  };
  const fill = (limit = PAGE) => {
    const found = rows.filter(matches).sort(orders[filter.order]);
    list.replaceChildren(...found.slice(0, limit).map((row) => sampleCard(row, range, longest, many, unfolded)));
    count.textContent = plural(found.length, "sample");
    more.hidden = found.length <= limit;
    if (!found.length) list.append(el("p", { class: "empty" }, "No sample matches; change the filters."));
  };
  const set = (key) => (value) => ((filter[key] = value), fill());
  const bound = (key, none, width = "5.5em") => el("input", { type: "number", step: "any", style: { width }, "aria-label": key, oninput: (event) => set(key)(event.target.value === "" ? none : Number(event.target.value)) });
  const statuses = [...new Set(rows.map((row) => row.status))].sort();
  const search = el("input", { type: "search", id: "rollout-search", placeholder: "in prompt, thought or response", oninput: debounce((event) => set("text")(event.target.value), 120) });
  const status = select([["", "any"], ...statuses.map((name) => [name, name.replace("_", " ")]), ["truncated", "truncated"]], set("status"));
  status.id = "rollout-status";
  const kind = select(KINDS.filter(([name]) => !name || rows.some((row) => row.kinds.includes(name))), set("kind"));
  kind.id = "rollout-kind";
  const order = select([["newest", "latest step first"], ["step", "first step first"], ["best", "highest reward"], ["worst", "lowest reward"], ["thought", "longest thought"]], set("order"));
  const fold = el("button", { type: "button", id: "unfold", onclick: () => {
    unfolded = !unfolded;
    fold.textContent = unfolded ? "Fold thoughts" : "Unfold thoughts";
    list.querySelectorAll(".thought-box").forEach((box) => (box.open = unfolded));
  } }, "Unfold thoughts");
  node.append(el("div", { class: "controls", role: "search", "aria-label": "Rollouts" },
    many ? field("Run", select([["", "all"], ...data.runs.map((run) => [run.label, run.label])], set("run"))) : null,
    field("Text", search), field("Chosen as", kind), field("Status", status),
    el("span", { class: "field" }, el("span", {}, "Reward"), bound("low", -Infinity), "to", bound("high", Infinity)),
    el("span", { class: "field" }, el("span", {}, "Step"), bound("first", 0, "4.5em"), "to", bound("last", Infinity, "4.5em")),
    field("Order", order), fold, count), list, more);
  fill();
  followSection(data, rows, range, longest);
}

/** One prompt across steps and runs, side by side. */
function followSection(data, rows, range, longest) {
  const groups = new Map();
  for (const row of rows) {
    const key = JSON.stringify(row.asked.messages);
    groups.set(key, [...(groups.get(key) || []), row]);
  }
  const places = (group) => new Set(group.map((row) => `${row.run.label} ${row.step}`)).size;
  const weight = (group) => places(group) + (group.some((row) => row.kinds.includes("changed")) ? 1000 : 0);
  const followed = [...groups.values()].filter((group) => places(group) > 1).sort((a, b) => weight(b) - weight(a)).slice(0, 40);
  if (!followed.length) return;
  const many = data.runs.length > 1;
  const columns = el("div", { class: "columns", tabindex: "0", role: "region", "aria-label": "Samples of one prompt, by step" });
  const asked = el("blockquote", { class: "asked" });
  const show = (index) => {
    const group = followed[index], seen = new Set();
    asked.textContent = question(group[0].asked);
    const chosen = [...group].sort((a, b) => Number(b.kinds.includes("changed")) - Number(a.kinds.includes("changed")))
      .filter((row) => !seen.has(`${row.run.label} ${row.step}`) && seen.add(`${row.run.label} ${row.step}`));
    const at = (row) => data.runs.indexOf(row.run);
    chosen.sort((a, b) => a.step - b.step || at(a) - at(b));
    columns.replaceChildren(...chosen.map((row) => el("article", { class: "column", style: { "--run": many ? colourOf(at(row)) : "var(--accent)" } },
      el("h4", {}, place(row), many ? el("span", { class: "run-name" }, row.run.label) : null),
      el("p", { class: "tokens" }, el("b", {}, `reward ${number(row.reward)}`), ` · ${row.thought_tokens} + ${row.response_tokens} tokens`),
      lengthBar(row, longest),
      el("h5", {}, "Thought"), el("pre", { class: "thought-text" }, row.thought || "–"),
      el("h5", {}, "Response"), el("pre", {}, row.response || "–"))));
  };
  const short = (text) => (text.length > 70 ? `${text.slice(0, 68)}…` : text);
  const choice = select(followed.map((group, i) => [String(i), `${short(question(group[0].asked))} (${places(group)} places)`]), (value) => show(Number(value)));
  choice.id = "follow";
  document.getElementById("rollouts").append(el("h3", {}, "One prompt over the steps"),
    el("p", { class: "lead" }, "The same prompt, sampled at several steps" + (many ? " and by several runs" : "") + ": how its thought changed."),
    el("div", { class: "controls" }, field("Prompt", choice)), asked, columns);
  show(0);
}

/** Calls a function once after the last of several events. */
function debounce(call, delay) {
  let timer = null;
  return (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(event), delay);
  };
}
