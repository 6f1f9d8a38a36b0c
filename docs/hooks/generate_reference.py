"""Generates the reference of commands, options and shipped configs from the code while the site is built.

A page holds a line such as `<!-- generated: commands -->`, which is replaced by the generated text.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from rlmt.options.ranges import _DESCRIPTIONS

SECTIONS = {
    "Modules": ("model", "rlmt.modules"),
    "Data": ("data", "rlmt.data"),
    "Algorithms": ("model.algorithm", "rlmt.algorithms"),
    "Rewards": ("model.reward", "rlmt.rewards"),
    "Engines": ("data.engine", "rlmt.engines"),
    "Thinking format": ("model.format", "rlmt.formats.thinking"),
    "Adapters and quantization": ("model.lora, model.quantization", "rlmt.models"),
    "Strategy": ("trainer.strategy", "rlmt.distributed"),
    "Callbacks": ("trainer.callbacks", "rlmt.callbacks"),
}
"""Heading of the configuration page → the key that takes the classes, and their package."""

_NOT_CONFIGURED = {"PolicySource", "PromptDataset", "PromptSampler", "Engine", "Algorithm", "Reward", "CriticOptions"}
"""Exported classes that no config names."""

_LIKE_FIT = ("validate", "test", "predict", "plan")
"""Commands whose options are those of `fit`, and a few more."""

_FROM_MODULE = {"optimizer": "CosineWithWarmup", "params": "MuonAdamW"}
"""First argument → the class that receives it from the module and not from the config."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the placeholders of a page; called by MkDocs."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: GENERATORS[match[1]](), markdown)


def commands() -> str:
    """The help of every command, as the command prints it; of the Trainer's commands in full for `fit` alone."""
    from rlmt.cli.commands import _COMMANDS

    fit = help_text(["fit"])
    parts = ["```text", help_text([]).rstrip(), "```", ""]
    for name in _COMMANDS:
        parts += [f"## rlmt {name}", ""]
        text = help_text([name])
        if name in _LIKE_FIT:
            own = sorted(_options(text) - _options(fit))
            parts += ["Takes the options of `rlmt fit`" + "".join(f", `{option}`" for option in own) + ".", ""]
            continue
        parts += [f'??? note "Output of `rlmt {name} --help`"', "", "    ```text"]
        parts += [f"    {line}".rstrip() for line in text.splitlines()] + ["    ```", ""]
    return "\n".join(parts)


def _options(text: str) -> set[str]:
    return set(re.findall(r"^ +(--[\w.]+)", text, re.MULTILINE))


def help_text(args: list[str]) -> str:
    """What `rlmt ARGS --help` prints on a terminal of 100 columns."""
    from rlmt.cli import main

    out, argv, columns = io.StringIO(), sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["rlmt"], "100"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*args, "--help"])
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return out.getvalue()


def configuration() -> str:
    """A table of options for every class that a config may name."""
    parts: list[str] = []
    for heading, (key, package) in SECTIONS.items():
        parts += [f"## {heading}", "", f"Key: `{key}`.", ""]
        for cls in configurable(package):
            summary = docstring_parser.parse(inspect.getdoc(cls) or "").short_description or ""
            parts += [f"### {cls.__name__}", "", f"`{cls.__module__}.{cls.__name__}`: {_escape(summary)}", ""]
            rows = options(cls)
            if rows:
                parts += ["| option | type | default | meaning |", "|---|---|---|---|"]
                parts += [f"| `{name}` | {kind} | {default} | {doc} |" for name, kind, default, doc in rows]
            else:
                parts.append("It has no options.")
            parts.append("")
    return "\n".join(parts)


def configurable(package: str) -> list[type]:
    """The classes of a package that a config may name, in alphabetical order."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    found = [getattr(module, name) for name in sorted(names) if name not in _NOT_CONFIGURED]
    if package == "rlmt.formats.thinking":
        found = [module.ThinkingFormat]
    if package == "rlmt.distributed":
        found = [importlib.import_module("rlmt.distributed.fsdp2").FSDP2]
    return [item for item in found if inspect.isclass(item) and not inspect.isabstract(item)]


def options(cls: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and first sentence of each option that jsonargparse accepts for a class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x")
    accepted = {action.dest.split(".")[1] for action in parser._actions if action.dest.startswith("x.")}
    rows: dict[str, tuple[str, str, str, str]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        docs = {param.arg_name: param.description or "" for param in docstring_parser.parse(base.__doc__ or "").params}
        hints = _hints(base)
        for name, parameter in inspect.signature(base).parameters.items():
            if name in accepted and name not in rows and _FROM_MODULE.get(name) != cls.__name__:
                default = parameter.default
                rows[name] = (
                    name,
                    type_name(hints.get(name)),
                    _default(default),
                    _escape(first_sentence(docs.get(name, ""))),
                )
    return list(rows.values())


def _hints(cls: type) -> dict[str, Any]:
    """The types of a constructor's arguments; as written where a name is imported for type checkers alone."""
    constructor: Callable[..., None] = vars(cls)["__init__"]
    try:
        return typing.get_type_hints(constructor)
    except NameError:
        return constructor.__annotations__


def type_name(hint: Any) -> str:
    """A type as the reader of a config writes it: literals by their values, classes by their names."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "null"
    if isinstance(hint, str):
        return _escape(hint)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(type_name(argument) for argument in arguments)
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(type_name(a) for a in arguments if a is not ...)}"
    if origin is not None and not inspect.isclass(hint):
        return str(getattr(origin, "__name__", origin))
    if hint in _DESCRIPTIONS:
        limits = _DESCRIPTIONS[hint].replace("of at least", "from")
        return limits.replace("an integer", "int").replace("a finite number", "float").replace("a number", "float")
    return str(getattr(hint, "__name__", hint))


def first_sentence(text: str) -> str:
    """The first sentence of a description, without line breaks."""
    text = " ".join(text.split())
    return re.split(r"(?<!Dr)(?<!eq)(?<=[.])\s(?=[A-Z`])", text, maxsplit=1)[0]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`".replace(" ", "")
    if isinstance(value, type):
        return f"`{value.__name__}`"
    return f"`{value}`"


def configs() -> str:
    """The shipped configs and the first sentence of each."""
    folder = Path(__file__).parents[2] / "configs"
    rows = ["| config | purpose |", "|---|---|"]
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path)):
        name = str(path.relative_to(folder).with_suffix(""))
        if not name.startswith("paper/"):
            lines = path.read_text(encoding="utf-8").splitlines()
            head = " ".join(
                line.removeprefix("#").strip() for line in itertools.takewhile(lambda x: x[:1] == "#", lines)
            )
            rows.append(f"| `{name}` | {_escape(first_sentence(head))} |")
    return "\n".join(rows)


def rloo() -> str:
    """The source of RLOO, the shortest of the objectives."""
    from rlmt.algorithms import RLOO

    return f"```python\n{inspect.getsource(RLOO)}```"


def verdicts() -> str:
    """The verdicts of a run's page and their thresholds."""
    from rlmt.report.verdicts import threshold_table

    return threshold_table()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


GENERATORS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "configs": configs,
    "rloo": rloo,
    "verdicts": verdicts,
}
