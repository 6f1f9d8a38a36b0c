"""The reference generated from the code, and the renderer of formulas."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
METRICS = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load("generate_reference")


def test_configuration_has_every_class_of_the_shipped_configs(reference: ModuleType) -> None:
    text = reference.configuration()
    configs = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "configs").rglob("*.yaml"))
    for name in set(re.findall(r"class_path: rlmt\.[\w.]*\.(\w+)", configs)):
        assert f"### {name}\n" in text, name


def test_options_have_type_default_and_meaning(reference: ModuleType) -> None:
    from rlmt.algorithms import DrGRPO
    from rlmt.modules import RLMTModule

    rows = {name: (kind, default) for name, kind, default, meaning in reference.options(RLMTModule) if meaning}
    assert rows["policy"] == ("str", "required") and rows["max_grad_norm"] == ("float above 0", "`1.0`")
    assert rows["gradient_checkpointing"] == ("bool \\| `selective`", "`false`")
    assert rows["lora"] == ("LoRA \\| null", "`null`")
    fixed = {name for name, *_ in reference.options(DrGRPO)}
    assert "clip_low" in fixed and "kl_coef" not in fixed  # what the class fixes is no option


def test_every_option_has_a_meaning(reference: ModuleType) -> None:
    missing = [
        f"{cls.__name__}.{name}"
        for _, package in reference.SECTIONS.values()
        for cls in reference.configurable(package)
        for name, _, _, meaning in reference.options(cls)
        if not meaning
    ]
    assert not missing


def test_commands_have_the_help_of_every_command(reference: ModuleType) -> None:
    text = reference.commands()
    assert (
        "--dtype DTYPE" in text and "--memory" in text and "--trainer.max_steps" in text and "--prompt PROMPT" in text
    )


NAME = r"(?:reward|response|length|policy|engine|critic|dpo|time|perf|sft|rm|val)/[a-z0-9_<>/]+"


def rows() -> list[list[str]]:
    """Cells of each metric's row."""
    lines = [line for line in METRICS.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def logged_names() -> set[str]:
    """Names of metrics that are written out in the code: `{stage}` is val, any other value of an f-string a `<…>`."""
    names: set[str] = set()
    for path in [*(ROOT / "src" / "rlmt").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else ast.unparse(part) for part in node.values]
                text = "".join(map(str, parts)).replace("{stage}", "val")
            if re.fullmatch(NAME, text):
                names.add(text)
    return names


def test_every_metric_of_the_code_is_documented() -> None:
    documented = {name for row in rows() for name in re.findall(rf"`({NAME})`", row[0])}
    internal = {"engine/importance_square"}  # becomes engine/effective_sample_size
    names = logged_names()
    assert len(names) > 50 and names - internal <= documented, names - internal - documented


def test_every_metric_has_meaning_and_cure() -> None:
    for row in rows():
        assert len(row) == 5 and row[1] and row[4].endswith("."), row


def test_ranges_of_metrics_are_the_thresholds_of_the_verdicts() -> None:
    from rlmt.callbacks import PolicyHealth
    from rlmt.report.verdicts import CHECKS, MAX_MISMATCH

    watch = {check.key: check.watch for check in CHECKS}
    healthy = {name: row[3] for row in rows() for name in re.findall(rf"`({NAME})`", row[0])}
    for metric, key in {
        "policy/kl": "kl",
        "policy/clip_low": "clip",
        "reward/malformed": "malformed",
        "length/truncated": "truncated",
        "reward/zero_std_groups": "zero_signal",
    }.items():
        assert re.search(rf"below (about )?{watch[key]:g}\b", healthy[metric]), metric
    assert PolicyHealth().max_mismatch == MAX_MISMATCH
    assert "<!-- generated: verdicts -->" in (ROOT / "docs/concepts/curves.md").read_text(encoding="utf-8")


def test_configs_are_listed_with_their_purpose(reference: ModuleType) -> None:
    assert "| `base` | Settings that all RL runs share. |" in reference.configs()


def test_formulas_become_svg() -> None:
    render = load("render_math")
    page = render.on_page_markdown("Half: $\\frac{1}{2}$, code: `$x$`.\n\n$$a_i = b$$\n")
    assert page.count("<svg") == 2 and "`$x$`" in page and "$$" not in page
    assert "currentColor" in page and "vertical-align" in page
