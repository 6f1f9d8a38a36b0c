"""The page in a real headless Chromium: it opens from the disk, draws, filters, folds and keeps text as text."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlmt.report.page import render_page, write_page
from rlmt.report.runs import read_runs

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u2028next\u2029line"

BLUE, ORANGE = "#0072b2", "#d55e00"
"""Colours of the first two arms in the light theme."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A driver of Chromium; skips the tests where it is not installed (Debian: chromium and chromium-driver)."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{word}")
    options.add_argument("--disable-sync")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--window-size=1360,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def opened(browser: Any, path: Path) -> Any:
    """Opens a page from the disk and waits until it is built."""
    browser.get_log("browser")
    browser.get(path.as_uri())
    limit = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.ready") != "true":
        assert time.monotonic() < limit, browser.execute_script("return document.getElementById('main').textContent")
        time.sleep(0.02)
    return browser


def config(form: str, seed: int) -> dict[str, Any]:
    return {"seed_everything": seed, "model": {"class_path": "M", "init_args": {"format": form}}}


@pytest.fixture(scope="module")
def two_arms(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two arms with two seeds each; one run is sick, and one thought is hostile."""
    folder, paths = tmp_path_factory.mktemp("runs"), []
    for form in ("think", "no_think"):
        for seed in (0, 1):
            metrics = synthetic.healthy(seed=seed)
            if form == "no_think":
                metrics["policy/kl"] = [0.05 * step for step in range(40)]
                metrics["reward/mean"] = [value - 1 for value in metrics["reward/mean"]]
            rows = synthetic.rows(8, text=HOSTILE if (form, seed) == ("think", 0) else "")
            paths.append(synthetic.write(folder / f"{form}{seed}", metrics, rows, config(form, seed)))
    return write_page(folder / "page.html", "think against no_think", read_runs(paths))


def show_chart(page: Any, metric: str) -> None:
    """Scrolls to the chart of a metric and waits until it is drawn."""
    script = """
        const chart = document.querySelector(`[data-metrics~="${arguments[0]}"]`);
        chart.scrollIntoView({block: "center", behavior: "instant"});
        return chart.querySelector("canvas") !== null;
    """
    limit = time.monotonic() + 20
    while not page.execute_script(script, metric):
        assert time.monotonic() < limit, metric
        time.sleep(0.05)
    time.sleep(0.2)  # uPlot draws in a microtask


def chips(page: Any, metric: str) -> list[str]:
    """The labels of a chart's curves, with their last values."""
    script = (
        'return [...document.querySelectorAll(`[data-metrics~="${arguments[0]}"] .chip`)].map((c) => c.textContent)'
    )
    found: list[str] = page.execute_script(script, metric)
    return found


def drawn_pixels(browser: Any, metric: str, colour: str) -> int:
    """Number of pixels of a colour, or nearly so because edges are smoothed, on the chart of a metric."""
    script = """
        const canvas = document.querySelector(`[data-metrics~="${arguments[0]}"] canvas`);
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const wanted = [1, 3, 5].map((i) => parseInt(arguments[1].slice(i, i + 2), 16));
        let count = 0;
        for (let i = 0; i < pixels.length; i += 4)
            if (pixels[i + 3] > 200 && wanted.every((value, j) => Math.abs(value - pixels[i + j]) < 40)) count++;
        return count;
    """
    return int(browser.execute_script(script, metric, colour))


def test_page_opens_from_the_disk_without_console_messages(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    page.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true)); window.scrollTo(0, 1e6)")
    time.sleep(0.5)
    assert page.get_log("browser") == []
    assert page.title == "think against no_think"
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert loaded == []


def test_curves_are_drawn_in_the_colours_of_the_arms(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    show_chart(page, "policy/kl")
    assert [drawn_pixels(page, "policy/kl", colour) > 100 for colour in (BLUE, ORANGE)] == [True, True]
    assert chips(page, "policy/kl") == ["think 0.039", "no_think 1.95"]
    page.find_element("css selector", '[data-metrics~="policy/kl"] .chip').click()  # hides the curve
    time.sleep(0.3)
    assert drawn_pixels(page, "policy/kl", BLUE) == 0 and drawn_pixels(page, "policy/kl", ORANGE) > 100


def test_difference_of_arms_is_paired_by_seed(browser: Any, two_arms: Path) -> None:
    """no_think − think in policy/kl is 0.05 · 39 − 0.001 · 39 = 1.911 at the last step."""
    page = opened(browser, two_arms)
    show_chart(page, "policy/kl")
    change(page, "smoothing", "0", "input")
    change(page, "mode", "think")
    show_chart(page, "policy/kl")
    assert chips(page, "policy/kl") == ["no_think − think 1.91"]


def test_zoom_and_cursor_are_shared_and_work_from_the_keyboard(browser: Any, two_arms: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = opened(browser, two_arms)
    for metric in ("reward/std", "reward/mean"):
        show_chart(page, metric)
    chart = page.find_element("css selector", '[data-metrics~="reward/mean"]')
    page.execute_script("arguments[0].focus()", chart)
    for _ in range(3):
        ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    time.sleep(0.2)
    other = page.find_element("css selector", '[data-metrics~="reward/std"]')
    assert [figure.get_attribute("data-step") for figure in (chart, other)] == ["2", "2"]
    reset = page.find_element("id", "reset")
    ActionChains(page).send_keys("+").perform()
    assert reset.is_enabled()
    page.execute_script("arguments[0].click()", reset)
    assert not reset.is_enabled()
    over = chart.find_element("css selector", ".u-over")
    ActionChains(page).move_to_element_with_offset(over, -80, 0).click_and_hold().move_by_offset(
        120, 0
    ).release().perform()
    assert reset.is_enabled()
    ActionChains(page).double_click(over).perform()
    assert not reset.is_enabled()


def change(page: Any, identifier: str, value: str, event: str = "change") -> None:
    """Sets a control as a user does."""
    script = "const [id, value, event] = arguments, c = document.getElementById(id); c.value = value;"
    page.execute_script(f"{script} c.dispatchEvent(new Event(event))", identifier, value, event)
    time.sleep(0.3)


def shown(page: Any) -> list[str]:
    texts: list[str] = page.execute_script("return [...document.querySelectorAll('.sample')].map((s) => s.textContent)")
    return texts


def test_rollouts_are_filtered_and_folded(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    count = lambda: page.execute_script("return document.getElementById('rollout-count').textContent")  # noqa: E731
    assert count() == "192 samples" and len(shown(page)) == 10
    change(page, "rollout-status", "unclosed")
    assert count() == "32 samples" and all("unclosed" in text for text in shown(page))
    change(page, "rollout-status", "")
    page.find_element("id", "rollout-search").send_keys("response 7 1 0")
    time.sleep(0.4)
    assert count() == "4 samples" and all("response 7 1 0" in text for text in shown(page))
    change(page, "rollout-search", "", "input")
    folded = "return [...document.querySelectorAll('.thought-box')].map((d) => d.open)"
    assert set(page.execute_script(folded)) == {False}
    page.execute_script("document.querySelector('.thought-box summary').click()")
    assert page.execute_script(folded)[0] is True
    page.execute_script("document.getElementById('unfold').click()")
    assert set(page.execute_script(folded)) == {True}
    low = page.find_element("css selector", "input[aria-label='low']")
    low.send_keys("7.2")
    time.sleep(0.2)
    assert count() == "4 samples"  # step 7, sample 2, of the prompt whose last sample is well formed, in four runs


def test_one_prompt_is_shown_across_steps_and_runs(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    columns = page.execute_script("return [...document.querySelectorAll('.column h4')].map((c) => c.textContent)")
    assert len(columns) == 32 and columns[:4] == [
        "step 0think, seed 0", "step 0think, seed 1", "step 0no_think, seed 0", "step 0no_think, seed 1",
    ]  # fmt: skip
    assert columns[-1] == "step 7no_think, seed 1"


def test_hostile_text_stays_text(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    box = page.find_element("id", "rollout-search")
    box.send_keys("onerror")
    time.sleep(0.4)
    texts = page.execute_script("return [...document.querySelectorAll('.thought-box pre')].map((p) => p.textContent)")
    assert texts and all(text.endswith(HOSTILE) for text in texts)
    made = page.execute_script(
        "return [window.hacked ?? null, document.querySelectorAll('main script, main img').length]"
    )
    assert made == [None, 0]


def test_verdicts_are_named_by_word_number_and_colour(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    cells = page.execute_script("return [...document.querySelectorAll('.matrix tbody tr')].map((r) => r.textContent)")
    (kl,) = [text for text in cells if text.startswith("Distance")]
    assert kl.count("✓ok") == 2 and kl.count("✕problem") == 2
    page.execute_script("document.querySelectorAll('.run-head')[2].click()")
    card = page.find_element("css selector", '[data-check="kl"]')
    assert "problem" in card.get_attribute("class") and "1.78 nats per token" in card.text and "Try:" in card.text


def test_colours_switch_between_light_and_dark(browser: Any, two_arms: Path) -> None:
    page = opened(browser, two_arms)
    background = "return getComputedStyle(document.body).backgroundColor"
    colours = []
    for _ in range(3):
        colours.append(page.execute_script(background))
        page.find_element("id", "theme").click()
    assert colours[1] == "rgb(245, 246, 248)" and colours[2] == "rgb(14, 19, 24)"


@pytest.fixture(scope="module")
def full_run(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 steps of 64 prompts × 8 samples with real-looking text: 61,440 rollouts, in files of 10 steps."""
    import pyarrow as pa

    from rlmt.engines.rollout_files import SCHEMA, write_rollouts

    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}{c}" for a in "bcdfglmnprst" for b in ("a", "en", "ou", "i") for c in "dlmnrst"])
    texts = [" ".join(rng.choice(words, 700)) for _ in range(400)]
    folder: Path = synthetic.write(tmp_path_factory.mktemp("full"), synthetic.healthy(120))
    template = synthetic.rows(1, 1, 1)[0]
    for first in range(0, 120, 10):
        rows = []
        for step in range(first, first + 10):
            for i in range(512):
                thought, response = texts[int(rng.integers(400))], texts[int(rng.integers(400))]
                rows.append(template | {
                    "step": step, "group": i // 8, "sample": i % 8, "prompt_index": (64 * step + i // 8) % 3840,
                    "thought": thought, "response": response, "text": "", "reward": float(rng.normal()),
                    "messages": [{"role": "user", "content": texts[i // 8][:400]}],
                    "thought_tokens": 700 + step, "response_tokens": 700, "status": "ok" if i % 50 else "unclosed",
                })  # fmt: skip
        table = pa.Table.from_pylist(rows, SCHEMA)
        write_rollouts(table, folder / f"rollouts/rollouts_{first:06d}-{first + 9:06d}.parquet")
    return folder


def test_full_run_stays_small_and_loads_fast(browser: Any, full_run: Path) -> None:
    began = time.process_time()
    page = render_page("full", read_runs([full_run]))
    seconds = time.process_time() - began
    (full_run / "report.html").write_text(page, encoding="utf-8")
    assert len(page.encode()) < 5_000_000
    opened(browser, full_run / "report.html")
    ready = int(browser.execute_script("return document.documentElement.dataset.milliseconds"))
    rows = int(browser.find_element("id", "rollout-count").text.split()[0])
    print(
        f"61,440 rollouts: {len(page) / 1e6:.2f} MB, made in {seconds:.1f} s of CPU, {rows} shown, ready in {ready} ms"
    )
    assert ready < 2000 * (4 if os.getloadavg()[0] > 4 else 1)  # other processes on the machine take the rest
    assert rows > 200
