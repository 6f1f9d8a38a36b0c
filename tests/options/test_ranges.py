"""Options with a range: every one of the project is refused outside it by the command line and by Python."""

import dataclasses
import importlib
import inspect
import io
import math
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import rlmt
from rlmt.cli.commands import main
from rlmt.cli.parsing import Parser
from rlmt.errors import UserError
from rlmt.options import ranges

EXAMPLES: dict[Any, tuple[list[Any], list[Any]]] = {
    ranges.PositiveInt: ([1, 7], [0, -1]),
    ranges.NonNegativeInt: ([0, 7], [-1]),
    ranges.IntAboveOne: ([2, 7], [1]),
    ranges.IntFromTwenty: ([20, 99], [19, 0]),
    ranges.ZeroOrOne: ([0, 1], [2, -1]),
    ranges.PositiveFloat: ([0.5, math.inf], [0.0, -1.0]),
    ranges.NonNegativeFloat: ([0.0, math.inf], [-0.5]),
    ranges.FloatAboveOne: ([1.5, math.inf], [1.0]),
    ranges.OpenUnitInterval: ([0.5], [0.0, 1.0]),
    ranges.ClosedUnitInterval: ([0.0, 1.0], [-0.1, 1.1]),
    ranges.UnitIntervalAboveZero: ([0.1, 1.0], [0.0, 1.1]),
    ranges.UnitIntervalBelowOne: ([0.0, 0.9], [-0.1, 1.0]),
    ranges.FiniteFloat: ([-2.5, 0.0], [math.inf, -math.inf]),
    ranges.FinitePositiveFloat: ([0.5], [0.0, math.inf]),
    ranges.FiniteNonNegativeFloat: ([0.0, 2.5], [-0.5, math.inf]),
}
"""For each type, values inside and outside."""

STEPS = ["fit", "--config", "base", "--config", "grpo", "--config", "tiny"]


def all_functions() -> list[Callable[..., Any]]:
    """Classes and functions of the project that declare an option with a range themselves."""
    types = {kind.__name__ for kind in EXAMPLES}
    found: list[Callable[..., Any]] = []
    for module in pkgutil.walk_packages(rlmt.__path__, "rlmt."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            function = vars(value).get("__init__") if inspect.isclass(value) else value
            if not (inspect.isfunction(function) and function.__module__ == value.__module__ == module.name):
                continue
            own = value if dataclasses.is_dataclass(value) else function  # a dataclass inherits fields in its __init__
            if any(set(re.findall(r"\w+", str(hint))) & types for hint in own.__annotations__.values()):
                found.append(value)
    return found


FUNCTIONS = all_functions()
OPTIONS = [(function, option, kind) for function in FUNCTIONS for option, kind in ranges.ranges(function).items()]
NAMES = [f"{function.__name__}.{option}" for function, option, _ in OPTIONS]


def call(function: Callable[..., Any], option: str, value: object) -> object:
    """Calls a function with one option set, and its other required arguments inside their range or None."""
    arguments: dict[str, Any] = {}
    kinds = ranges.ranges(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[name] = EXAMPLES[kinds[name]][0][0] if name in kinds else None
    if inspect.isabstract(function):
        function = type(function.__name__, (function,), dict.fromkeys(function.__abstractmethods__))
    return function(**arguments | {option: value})


def parser_for(option: str, function: Callable[..., Any]) -> Parser:
    """A parser with that option alone."""
    parser = Parser()
    parser.add_argument(f"--{option}", type=inspect.signature(function, eval_str=True).parameters[option].annotation)
    return parser


def text(value: float) -> str:
    """A number as YAML writes it."""
    return str(value).replace("inf", ".inf").replace("nan", ".nan")


def test_every_kind_of_class_declares_ranges() -> None:
    names = {function.__name__ for function in FUNCTIONS}
    assert len(OPTIONS) > 70
    assert names >= {"LoRA", "PolicyGradient", "LengthWindow", "RolloutDataModule", "VLLMServerEngine", "chat"}
    assert names >= {"TrainingModule", "CosineWithWarmup", "SampleTable", "SupervisedDataModule"}
    assert {kind for _, _, kind in OPTIONS} == set(EXAMPLES)


@pytest.mark.parametrize(("function", "option", "kind"), OPTIONS, ids=NAMES)
def test_python_refuses_values_outside(function: Callable[..., Any], option: str, kind: Any) -> None:
    wrong = [True, "1", math.nan, 1.5] if kind._type is int else [True, "1", math.nan]
    for value in (*EXAMPLES[kind][1], *wrong):
        with pytest.raises(UserError, match=rf"^{function.__name__}\.{option} is '?{value}'?: must be .+\.$"):
            call(function, option, value)


@pytest.mark.parametrize(("function", "option", "kind"), OPTIONS, ids=NAMES)
def test_parser_refuses_values_outside(function: Callable[..., Any], option: str, kind: Any) -> None:
    parser = parser_for(option, function)
    for value in (*map(text, EXAMPLES[kind][1]), ".nan", "many", "true", "[1]"):
        with pytest.raises(UserError) as error:
            parser.parse_args([f"--{option}={value}"])
        assert str(error.value).startswith(f"--{option} is {value}: must be a"), error.value
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(("function", "option", "kind"), OPTIONS, ids=NAMES)
def test_parsed_values_are_plain_numbers(function: Callable[..., Any], option: str, kind: Any) -> None:
    parser = parser_for(option, function)
    for value in EXAMPLES[kind][0]:
        for args in ([f"--{option}={text(value)}"], {option: value}):
            parsed = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)
            assert parsed[option] == value and type(parsed[option]) is kind._type


@pytest.mark.parametrize(("function", "option", "kind"), OPTIONS, ids=NAMES)
def test_python_accepts_values_inside(function: Callable[..., Any], option: str, kind: Any) -> None:
    arguments: dict[str, Any] = dict.fromkeys(inspect.signature(function).parameters)
    arguments |= {name: EXAMPLES[other][0][0] for name, other in ranges.ranges(function).items()}
    for value in EXAMPLES[kind][0]:
        ranges.check_ranges(function, arguments | {option: value})
    if type(None) in get_args(inspect.signature(function, eval_str=True).parameters[option].annotation):
        ranges.check_ranges(function, arguments | {option: None})
    else:
        with pytest.raises(UserError, match=f"{option} is None"):
            ranges.check_ranges(function, arguments | {option: None})


def test_subclass_is_named_in_the_error() -> None:
    from rlmt.algorithms import GRPO

    with pytest.raises(UserError, match=r"^GRPO\.kl_coef is -1: must be a number of at least 0\.$"):
        GRPO(kl_coef=-1)


def test_parsed_values_load_with_weights_only() -> None:
    from rlmt.models.adapters import LoRA

    parsed = parser_for("rank", LoRA).parse_args(["--rank=8"])
    file = io.BytesIO()
    torch.save(parsed.as_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"rank": 8}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--data.batch_size 0", "--data.batch_size is 0: must be an integer above 0."),
        ("--data.val_size -1", "--data.val_size is -1: must be an integer of at least 0."),
        (
            "--model.algorithm PPO --model.algorithm.gamma 2",
            "--model.algorithm.gamma is 2: must be a number above 0 and at most 1.",
        ),
        ("--model.lora LoRA --model.lora.rank 0", "--model.lora.rank is 0: must be an integer above 0."),
        (
            "--model.scheduler CosineWithWarmup --model.scheduler.warmup 1",
            "--model.scheduler.warmup is 1: must be a number of at least 0 and below 1.",
        ),
        (
            "--trainer.callbacks+=SampleTable --trainer.callbacks.max_chars 3",
            "--trainer.callbacks.max_chars is 3: must be an integer of at least 20.",
        ),
        ("--model.malformed_reward .inf", "--model.malformed_reward is .inf: must be a finite number."),
    ],
)
def test_command_refuses_values_outside_in_one_line(
    args: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*STEPS, *args.split()]) == 2
    assert capsys.readouterr().err == f"rlmt: error: {message}\n"
