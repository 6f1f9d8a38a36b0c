// Builds the page from its payload.

async function start() {
  const data = await readPayload();
  document.getElementById("loading").remove();
  document.getElementById("title").textContent = data.title;
  const verdict = ORDER.find((state) => data.runs.some((run) => run.verdict === state));
  const pill = document.getElementById("state");
  theme.start();
  if (data.runs.length) {
    pill.replaceWith(badge(verdict));
    verdictSection(data);
    curvesSection(data);
    resultSections(data);
    rolloutsSection(data);
    distributionsSection(data);
    timeBars(data);
    configurationSection(data);
  } else {
    pill.remove();
    resultSections(data);
  }
  document.getElementById("footer").append(`rlmt ${data.version} · written ${data.created} · curves by uPlot (MIT licence)`);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.documentElement.dataset.ready = "true";
  document.documentElement.dataset.milliseconds = String(Math.round(performance.now()));
}

start().catch((error) => {
  const notice = document.getElementById("loading");
  (notice || document.getElementById("main")).textContent = `The page cannot be shown: ${error.message}`;
  throw error;
});
