"""The benchmarks, one per file."""

from rlmt.evaluation.benchmark import Benchmark
from rlmt.evaluation.benchmarks.alpaca_eval import AlpacaEval
from rlmt.evaluation.benchmarks.arena_hard import ArenaHard
from rlmt.evaluation.benchmarks.creative_writing import CreativeWriting
from rlmt.evaluation.benchmarks.ifbench import IFBench
from rlmt.evaluation.benchmarks.ifeval import IFEval
from rlmt.evaluation.benchmarks.math_500 import MATH500
from rlmt.evaluation.benchmarks.mmlu_redux import MMLURedux
from rlmt.evaluation.benchmarks.popqa import PopQA
from rlmt.evaluation.benchmarks.wildbench import WildBench
from rlmt.evaluation.benchmarks.zebra_logic import ZebraLogic

BENCHMARKS: dict[str, type[Benchmark]] = {
    "wildbench": WildBench,
    "alpaca_eval": AlpacaEval,
    "arena_hard": ArenaHard,
    "creative_writing": CreativeWriting,
    "popqa": PopQA,
    "mmlu_redux": MMLURedux,
    "ifbench": IFBench,
    "ifeval": IFEval,
    "math_500": MATH500,
    "zebra_logic": ZebraLogic,
}
"""The benchmarks by name: the seven of the paper's table in its order, then the three of its appendix."""
