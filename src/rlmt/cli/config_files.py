"""Composition of `--config` files: their contents are merged first and parsed once, so they compose in any order."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from enum import Enum
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import get_yaml_default_loader, yaml_load
from jsonargparse._parameter_resolvers import get_signature_parameters

import rlmt.configs
from rlmt.errors import UserError

SHIPPED = Path(rlmt.configs.__file__).parent
"""Folder of the shipped configs."""

Tree = dict[str, Any]

_OPTIONS = ("-c", "--config")
_CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
_CLASS_NAME = re.compile(r"(?:\w+\.)*[A-Z]\w*")
_CONTAINERS = ("model", "data", "trainer")
_MODULES = (
    *("rlmt.algorithms", "rlmt.rewards", "rlmt.engines", "rlmt.modules", "rlmt.data", "rlmt.models", "rlmt.callbacks"),
    *("torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.strategies", "lightning.pytorch.loggers"),
)
"""Modules whose classes options name without a module path."""


class _Loader(get_yaml_default_loader()):  # type: ignore[misc]
    """Reads quoted numbers in scientific notation as numbers, and `None` as null.

    jsonargparse writes the value of a nested option, such as `--model.algorithm.dual_clip null`, as Python's `None`.
    """

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """The value of a scalar."""
        if node.style in ("'", '"') and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", node.value):
            return float(node.value)
        return super().construct_scalar(node)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"None"), ["N"])


def load_yaml(text: str) -> Any:
    """Reads YAML as `_Loader` does; text that is no document of its own, such as `a:`, stays text."""
    value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    if isinstance(value, dict) and all(item is None for item in value.values()):
        return yaml_load(text)  # type: ignore[no-untyped-call]
    return value


# Defaults of Lightning's classes that are members of an Enum, such as Timer's interval, are saved as their text.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


class ConfigFiles:
    """The `--config` files of a command line.

    Args:
        args: Command line after the command's name, with file paths as config names.

    Raises:
        UserError: A file cannot be read, or is no YAML mapping.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.trees: dict[str, Tree] = {}
        """Path → content of each file, in the order given; a file given again moves to the end."""
        self.other_args: list[str] = []
        words = iter(args)
        for word in words:
            option, equals, value = word.partition("=")
            if option not in _OPTIONS or (not equals and (value := next(words, "")) == ""):
                self.other_args.append(word)
                continue
            self.trees.pop(value, None)
            self.trees[value] = _read(value)

    @property
    def args(self) -> list[str]:
        """The command line with the merged content in place of the files; other options take precedence over it."""
        if not self.trees:
            return self.other_args
        merged = merge(self.trees.values())
        return ["--config", yaml.safe_dump(merged, sort_keys=False, width=10**6), *self.other_args]

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Lets errors of the parser name the file that sets an option."""
        token = _PARSED.set(self)
        try:
            yield
        finally:
            _PARSED.reset(token)

    def check_names(self, known: Collection[str]) -> None:
        """Checks the names at the top of each file.

        Raises:
            UserError: A name is not known; the parser would ignore it.
        """
        for path, tree in self.trees.items():
            for name in tree:
                if name.partition(".")[0] not in known:
                    close = get_close_matches(name, known, 1)
                    hint = f" Did you mean {close[0]}?" if close else ""
                    raise UserError(f"--{name} ({path}): no such option.{hint} `--help` lists the options.")

    def check_classes(self) -> None:
        """Checks that a class is named for the module and its data.

        Raises:
            UserError: There are only options for one, as in a file that is to be composed with another.
        """
        merged = merge(self.trees.values())
        for key in ("model", "data"):
            given = any(word.partition("=")[0] in (f"--{key}", f"--{key}.class_path") for word in self.other_args)
            options = merged.get(key)
            if isinstance(options, dict) and "class_path" not in options and not given:
                files = ", ".join(Path(path).name for path, tree in self.trees.items() if key in tree)
                raise UserError(
                    f"--config: {files} {'sets' if ',' not in files else 'set'} options of --{key}, but no config "
                    "names its class; put --config base (or sft, or reward) first."
                )

    def file_with(self, option: str) -> str | None:
        """The last file that sets an option; None if no file does.

        Args:
            option: Name as on the command line, such as `--model.algorithm.kl_coef`.
        """
        if any(word.partition("=")[0].rstrip("+").replace(".init_args", "") == option for word in self.other_args):
            return None  # the command line takes precedence
        keys = option.removeprefix("--").split(".")
        path = next((path for path, tree in reversed(self.trees.items()) if _has(tree, keys)), None)
        shipped = path is not None and Path(path).is_relative_to(SHIPPED)
        return f"configs/{Path(path).relative_to(SHIPPED)}" if path is not None and shipped else path


_PARSED: ContextVar[ConfigFiles | None] = ContextVar("config_files", default=None)


def file_of(option: str) -> str | None:
    """The file that sets an option, among those that are being parsed; None if none does."""
    files = _PARSED.get()
    return None if files is None else files.file_with(option)


def merge(trees: Iterable[Mapping[str, Any]]) -> Tree:
    """Merges configurations; later values take precedence, and values for a class hold whoever names the class.

    If files name different classes for an option, the last one is used, with those arguments of the others that it
    has, too. Lists replace each other; those under `NAME+` are appended to `NAME` at the end.

    Args:
        trees: Contents of the files, in their order.
    """
    merged: Tree = {}
    for tree in map(dict, trees):
        for key, value in tree.items():
            merged[key] = _merge_values(merged[key], value, container=key in _CONTAINERS) if key in merged else value
    finished: Tree = _finish(merged)
    return finished


def _merge_values(before: Any, after: Any, container: bool = False) -> Any:
    """Merges two values of one option."""
    if isinstance(before, _Class) or _is_class(before):
        if isinstance(after, str) and _CLASS_NAME.fullmatch(after):
            after = {"class_path": after}
        if isinstance(after, Mapping) and not _is_class(after) and before.get("class_path") is not None:
            after = {"init_args": dict(after)}
        if _is_class(after):
            return _Class.of(before).extended(after)
    elif isinstance(before, str) and _CLASS_NAME.fullmatch(before) and _is_class(after):
        return _Class.of({"class_path": before}).extended(after)
    elif container and isinstance(before, Mapping) and isinstance(after, Mapping):
        return _merge_mappings(before, after)
    return after


def _merge_mappings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Tree:
    """Merges the options of one class."""
    merged = dict(before)
    for key, value in after.items():
        if key.endswith("+") and key in merged and isinstance(value, list) and isinstance(merged[key], list):
            merged[key] = [*merged[key], *value]
        else:
            merged[key] = _merge_values(merged[key], value) if key in merged else value
    return merged


class _Class(dict[str, Any]):
    """A class that several files configure: `layers` has the arguments of each file, with the class they are for."""

    layers: list[tuple[str | None, Mapping[str, Any]]]

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> _Class:
        """A class that one file configures."""
        if isinstance(value, cls):
            return value
        made = cls({key: item for key, item in value.items() if key != "init_args"})
        made.layers = [(value.get("class_path"), value.get("init_args") or {})]
        return made

    def extended(self, value: Mapping[str, Any]) -> _Class:
        """The class with the options of one more file."""
        made = _Class({**self, **{key: item for key, item in value.items() if key != "init_args"}})
        made.layers = [*self.layers, (made.get("class_path"), value.get("init_args") or {})]
        return made

    def finished(self) -> Tree:
        """As a configuration names it."""
        used = self.get("class_path")
        kept = [args if _same(path, used) else _accepted(args, used) for path, args in self.layers]
        start: Mapping[str, Any] = {}
        init_args = _finish(reduce(_merge_mappings, kept, start))
        return {**self, **({"init_args": init_args} if init_args else {})}


def _finish(value: Any) -> Any:
    """Replaces `_Class` by plain data, and appends the lists under `NAME+` to those under `NAME`."""
    if isinstance(value, _Class):
        return value.finished()
    if not isinstance(value, Mapping):
        return value
    finished = {key: _finish(item) for key, item in value.items()}
    for key in [key for key in finished if key.endswith("+") and isinstance(finished.get(key[:-1]), list)]:
        finished[key[:-1]] = [*finished[key[:-1]], *finished.pop(key)]
    return finished


def _is_class(value: Any) -> bool:
    """Whether a value configures a class."""
    return isinstance(value, Mapping) and bool(value) and value.keys() <= _CLASS_KEYS


def _same(path: str | None, used: str | None) -> bool:
    """Whether arguments are for the class that is used; those of a file that names no class are."""
    return path is None or used is None or path.rpartition(".")[2] == used.rpartition(".")[2]


def _accepted(init_args: Mapping[str, Any], class_path: str | None) -> Tree:
    """The arguments that a class has; all of them if the class is not found, which the parser will report."""
    kind = find_class(class_path or "")
    if kind is None:
        return dict(init_args)
    names = {parameter.name for parameter in get_signature_parameters(kind, "__init__")}
    if dropped := [key for key in init_args if key.removesuffix("+") not in names]:
        from lightning.pytorch.utilities import rank_zero_info  # this file is read before Lightning is imported

        rank_zero_info(f"--config: {class_path} has no option {', '.join(dropped)}; of another class, it is dropped")
    return {key: value for key, value in init_args.items() if key.removesuffix("+") in names}


def find_class(class_path: str) -> type | None:
    """The class of a path or of a name without one."""
    module, _, name = class_path.rpartition(".")
    for candidate in [module] if module else _MODULES:
        try:
            found = getattr(import_module(candidate), name, None)
        except ImportError:
            continue
        if isinstance(found, type):
            return found
    return None


def _read(path: str) -> Tree:
    """The content of a file."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); give a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"--config {path}: {where}{problem}; correct the YAML.") from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds a {type(tree).__name__}, not options; write `option: value` lines.")
    return {str(key): value for key, value in (tree or {}).items()}


def _has(tree: Any, keys: Sequence[str]) -> bool:
    """Whether a configuration has an option."""
    if not keys:
        return True
    if not isinstance(tree, Mapping):
        return False
    inner = tree.get("init_args")
    return any(key == keys[0] and _has(value, keys[1:]) for key, value in tree.items()) or (
        isinstance(inner, Mapping) and _has(inner, keys)
    )
