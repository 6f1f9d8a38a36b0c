"""docs/algorithms.md is true: its code is the code, and its names are names."""

import ast
import inspect
import re
from pathlib import Path

from rlmt import algorithms
from rlmt.algorithms import GRPO, RLOO, Algorithm, PolicyGradient, rloo
from rlmt.algorithms.critic_free import CriticFree

ROOT = Path(__file__).parents[2]
NOTE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
PLAIN = NOTE.replace("\\_", "_")


def test_the_example_is_the_code() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", NOTE, re.DOTALL)
    assert code == inspect.getsource(RLOO)
    file = ast.parse(inspect.getsource(rloo))
    assert [type(part) for part in file.body if not isinstance(part, ast.Expr | ast.ImportFrom)] == [ast.ClassDef]


def test_every_variant_is_in_the_table_with_its_paper() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \(\[[\d.]+\]\(https://arxiv.org/abs/([\d.]+)\)\)", NOTE, re.MULTILINE))
    assert {name for name in table if hasattr(algorithms, name)} == set(table) >= {"DrGRPO", "DAPO", "GSPO", "RLOO"}
    for name, paper in table.items():
        assert paper in inspect.getdoc(getattr(algorithms, name))  # type: ignore[operator]


def test_what_a_new_one_provides_is_the_seam() -> None:
    named = set(re.findall(r"`(\w+)(?:\([\w, ]*\))?`", NOTE.split("## A new one")[1]))
    assert Algorithm.__abstractmethods__ <= named
    assert {name for name in named if name.startswith("needs_")} <= set(dir(Algorithm))


def test_its_options_of_the_policy_gradients_are_options() -> None:
    own = inspect.signature(GRPO.__init__).parameters | inspect.signature(CriticFree.__init__).parameters
    options = set(own | inspect.signature(PolicyGradient.__init__).parameters) - {"self", "options"}
    assert options - {"importance_cap", "overlong_buffer", "reward_kl_coef"} <= set(re.findall(r"\w+", PLAIN))
