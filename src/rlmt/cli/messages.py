"""jsonargparse's nested reports in one line: the option's full name, why its value is invalid, and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import get_all_subclass_paths
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from rlmt.cli.config_files import find_class

_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Expected a <class 'NoneType'>"
    r"|Given value type: |Given value: |Expected a path but .* not accessible or invalid"
    r"|Expected a <class 'collections.abc.Iterable'>|Expected a <class 'bool'>$|Expected a dot import path"
)
_CLASS_ERROR = re.compile(
    r"Expected a dot import path string: (?P<a>\S+)|Import path (?P<b>\S+) does not correspond to a subclass"
    r"|Unexpected import path format: (?P<c>\S+)|Expected an instantiatable class, but (?P<d>\S+) is"
    r"|Expected '(?P<e>\S+)' to be a (?:sub)?class"
)
_MOST_NAMES = 16
"""Longer lists of names are cut to the nearest ones."""

_PACKAGES = ("bitsandbytes", "comet_ml", "mlflow", "neptune", "openai", "tensorboard", "vllm", "wandb")
"""Packages that some options require, and that are not always installed."""

FileOf = Callable[[str], str | None]
"""Name of an option → the configuration file that sets it, if one does."""


class Report:
    """A report of jsonargparse, taken apart.

    It has a level for each key, with indentation, and repeats the value at each one. The keys on the way make up the
    option's name, and the innermost reasons are the ones to print.

    Args:
        message: The report, of several lines.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        keys: list[str] = []
        reasons: list[str] = []
        self.owner = ""
        """Path of the innermost class that has a problem."""
        for line in message.splitlines():
            text = line.strip().removeprefix("- ").strip()
            if key := re.match(r'(?:Type .+ callable class: )?Parser key "(.+?)"(?: element \d+)?:\s*(.*)', text):
                keys.append(key[1])
                text = key[2]
            if class_path := re.match(r"Problem with given class_path '(.+?)':\s*(.*)", text):
                self.owner, text = class_path[1], class_path[2]
            if text and not _NOISE.match(text):
                reasons.append(text)
        keys = keys[1:] if keys[:1] == ["config"] else keys
        self.option = "--" + ".".join(key for key in ".".join(keys).split(".") if key != "init_args")
        self.keys = [key for key in self.option.removeprefix("--").split(".") if key]
        self.has_reason = bool(reasons)
        """Whether there is a reason besides a class that was not found."""
        self.reason = "; ".join(dict.fromkeys(reasons)) or " ".join(message.split())

    @property
    def parent(self) -> Any:
        """The class that has the option; None if it is not found."""
        if self.keys[:1] == ["trainer"] and not self.owner:
            return Trainer
        return find_class(self.owner) if self.owner and len(self.keys) > 1 else None


def one_line(message: str, options: Iterable[str] = (), file_of: FileOf = lambda option: None) -> str:
    """Converts jsonargparse's nested report to one line.

    Args:
        message: The report, of several lines.
        options: Names of the parser's options, such as `--trainer.max_steps`.
        file_of: Finds the configuration file of an option.
    """
    known = [option for option in options if option.startswith("--") and not option.endswith(("+", ".help"))]
    report = Report(message)
    where = f"{report.option}{_in_file(report.option, file_of)}"
    # First: a class that takes the value's option is the one that is meant, whatever other classes of a union say.
    if out_of_range := re.search(r"Not of type \w+: (is .+?: must be .+?\.)(?=\. Got value|; |$)", report.reason):
        return f"{where} {out_of_range[1]}"
    text = _unknown(report, known, file_of) or _missing(report, known) or _wrong_class(report, file_of)
    if text is not None:
        return text
    if attribute := re.search(r"module '(\S+)' has no attribute '(\S+)'", report.reason):
        return f"{where}: {attribute[1]} has no class {attribute[2]!r}; check the spelling."
    if module := re.search(r"No module named '(.+?)'", report.reason):
        return missing_module(where, module[1])
    if value := re.match(r"argument (\S+?): expected (.+)", report.reason):
        return f"{value[1].split('/')[-1]}: no value; give {value[2].replace('argument', 'value')}."
    if choices := re.findall(r"Expected a typing.Literal\[(.+?)\]", report.reason):
        return _wrong_choice(report, where, ", ".join(choices))
    if not report.keys:
        return report.reason
    return f"{where}: {_plain(report.reason).rstrip('.')}."


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean X?` for the most similar name; "" if none is similar."""
    by_lower = {other.lower(): other for other in names}
    found = get_close_matches(name.lower(), by_lower, 3, 0.6)
    found.sort(key=lambda other: sorted(other) != sorted(name.lower()))  # swapped letters are the likeliest mistake
    return f" Did you mean {by_lower[found[0]]}?" if found else ""


def unknown_class(option: str, place: str, name: str, names: Sequence[str]) -> str:
    """The line for a name that is no class, with the valid names."""
    problem = f"{option}{place}: no class {name!r} was found"
    close = nearest(name.rpartition(".")[2], names)
    if not names:
        return f"{problem}; give its path, such as my_file.MyClass."
    if len(names) > _MOST_NAMES:
        return f"{problem}.{close} `{option}.help` lists the classes."
    return f"{problem}.{close} Choose from {', '.join(names)}, or give the path of your own."


def missing_module(subject: str, module: str) -> str:
    """The line for a module that cannot be imported."""
    package = module.partition(".")[0]
    if package in _PACKAGES:
        return f"{subject}: the package {package} is not installed; pip install {package}."
    return f"{subject}: no module {module!r} was found in the working folder or on PYTHONPATH; check the spelling."


def _in_file(option: str, file_of: FileOf) -> str:
    """` (file)` for an option that a configuration file sets."""
    file = file_of(option)
    return f" ({file})" if file else ""


def _unknown(report: Report, known: Sequence[str], file_of: FileOf) -> str | None:
    """The line for an option that does not exist."""
    if found := re.search(r"Option '(.+?)' is not accepted", report.reason):
        name = ".".join(key for key in found[1].split(".") if key != "init_args")
        if given := re.search(r"Got value: Namespace\(class_path='(.+?)'", report.reason):
            report.owner = given[1]  # of a callable, such as an optimizer
        owner = find_class(report.owner)
        own_name = report.owner.rpartition(".")[2]
        option = f"{report.option}.{name}"
        names = [parameter.name for parameter in get_signature_parameters(owner, "__init__")] if owner else []
        close = nearest(name.partition(".")[0], names)
        place = _in_file(option, file_of)
        return (
            f"{option}{place}: {own_name} has no option {name!r}.{close} `{report.option}.help {own_name}` lists them."
        )
    found = re.match(r"(?:Subcommand '\w+' does not accept option '(.+?)')", report.reason)
    option = f"--{found[1]}" if found else ""
    if report.reason.startswith("unrecognized arguments: "):
        option = report.reason.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
    if not option:
        return None
    if not option.startswith("-"):
        return f"{option!r} is not an option; options begin with --, and `--help` lists them."
    return f"{option}{_in_file(option, file_of)}: no such option.{nearest(option, known)} `--help` lists the options."


def _wrong_choice(report: Report, where: str, listed: str) -> str:
    """The line for a value that is none of the valid ones."""
    choices = list(dict.fromkeys(choice.strip("'\"") for choice in listed.split(", ")))
    value = re.search(r"Given value: (\S+)$|Got value: (\S+)", report.message, re.MULTILINE)
    given = next((group.rstrip(".") for group in value.groups() if group), "") if value else ""
    return f"{where}: {given!r} is not valid.{nearest(given, choices)} Choose from {', '.join(choices)}."


def _plain(reason: str) -> str:
    """A reason without Python's words for types, and with the value once."""
    words = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "tuple": "a list"}
    reason = re.sub(r"Expected a <class '(\w+)'>", lambda kind: f"expected {words.get(kind[1], kind[1])}", reason)
    return re.sub(r"(\. Got value: \S+?)\. Got value: Namespace.*", r"\1", reason)


def _missing(report: Report, known: Sequence[str]) -> str | None:
    """The line for arguments that are required and not given."""
    required = re.match(r"the following arguments are required: (.+)", report.reason)
    if required is None:
        return None
    names = required[1].split(", ")
    if report.keys:
        return f"{report.option}.{required[1]} is required; pass it, or a --config that sets it."
    if any(name.endswith(".model") for name in names):
        return "--model is required; begin with the configs base and grpo, sft or reward: --config base --config grpo."
    if any(f"--{name.rpartition('.')[2]}" in known or "." in name for name in names):
        return f"{', '.join('--' + name.rpartition('.')[2] for name in names)}: required; pass a --config that sets it."
    words = " ".join(name.upper() for name in names)
    return f"{words}: missing; add {'it' if len(names) == 1 else 'them'} after the command."


def _wrong_class(report: Report, file_of: FileOf) -> str | None:
    """The line for a class that does not exist or does not fit."""
    found = _CLASS_ERROR.search(report.message)
    if found is None or not report.keys or (report.has_reason and not _CLASS_ERROR.search(report.reason)):
        return None
    name = next(group for group in found.groups() if group).strip("'.,")
    if report.owner and not report.owner.endswith(name) and len(report.keys) > 1:
        annotation = _annotation(report.parent, report.keys[-1])
    elif len(report.keys) == 1:
        annotation = {"model": LightningModule, "data": LightningDataModule}.get(report.keys[0])
    else:
        annotation = _annotation(report.parent, report.keys[-1])
    return unknown_class(report.option, _in_file(report.option, file_of), name, class_names(annotation))


def _annotation(owner: Any, name: str) -> Any:
    """The type of a constructor argument."""
    parameters = get_signature_parameters(owner, "__init__") if isinstance(owner, type) else []
    return next((parameter.annotation for parameter in parameters if parameter.name == name), None)


def class_names(annotation: Any) -> list[str]:
    """Short names of the classes that a type accepts, sorted; of modules and data modules only rlmt's."""
    paths = {path for base in _bases(annotation) for path in get_all_subclass_paths(base)}
    if annotation in (LightningModule, LightningDataModule):
        paths = {path for path in paths if path.startswith("rlmt.")}
    return sorted({path.rpartition(".")[2] for path in paths})


def _bases(annotation: Any) -> Iterator[type]:
    """The classes in a type."""
    if isinstance(annotation, type) and annotation.__module__ not in ("builtins", "collections.abc"):
        yield annotation
    for part in get_args(annotation):
        for inner in part if isinstance(part, list) else [part]:
            yield from _bases(inner)
