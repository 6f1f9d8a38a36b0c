"""docs/algorithms.md agrees with the code: its example, its variants, its interface and its options."""

import ast
import inspect
import re

from rlmt import algorithms
from rlmt.algorithms import GRPO, RLOO, Algorithm, PolicyGradient, rloo
from rlmt.algorithms.critic_free import CriticFree

from .pages import ROOT

PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
PLAIN = PAGE.replace("\\_", "_")


def test_example_is_all_of_rloo() -> None:
    assert "<!-- generated: rloo -->" in PAGE
    file = ast.parse(inspect.getsource(rloo))
    assert [type(part) for part in file.body if not isinstance(part, ast.Expr | ast.ImportFrom)] == [ast.ClassDef]
    assert len(inspect.getsource(RLOO).splitlines()) < 40


def test_every_variant_is_in_the_table_with_its_paper() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \(\[[\d.]+\]\(https://arxiv.org/abs/([\d.]+)\)\)", PAGE, re.MULTILINE))
    assert {name for name in table if hasattr(algorithms, name)} == set(table) >= {"DrGRPO", "DAPO", "GSPO", "RLOO"}
    for name, paper in table.items():
        assert paper in inspect.getdoc(getattr(algorithms, name))  # type: ignore[operator]


def test_interface_of_a_new_algorithm_is_listed() -> None:
    named = set(re.findall(r"`(\w+)(?:\([\w, ]*\))?`", PAGE.split("## A new one")[1]))
    assert Algorithm.__abstractmethods__ <= named
    assert {name for name in named if name.startswith("needs_")} <= set(dir(Algorithm))


def test_every_option_of_the_policy_gradients_is_named() -> None:
    own = inspect.signature(GRPO.__init__).parameters | inspect.signature(CriticFree.__init__).parameters
    options = set(own | inspect.signature(PolicyGradient.__init__).parameters) - {"self", "options"}
    assert options - {"importance_cap", "overlong_buffer", "reward_kl_coef"} <= set(re.findall(r"\w+", PLAIN))
