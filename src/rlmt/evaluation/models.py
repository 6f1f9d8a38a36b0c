"""Models to evaluate: checkpoints, folders, hub names and endpoints, resolved before any weights are read."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser

from rlmt.annotations import PretrainedConfig, PreTrainedTokenizerBase
from rlmt.endpoints import Endpoint
from rlmt.errors import UserError, first_line
from rlmt.formats.resolve import check_format, resolve_format
from rlmt.formats.thinking import FILE_NAME, FormatName, ThinkingFormat
from rlmt.models.assets import POLICY_ASSETS, load_stop_token_ids
from rlmt.models.loading import check_causal_lm, load_config, load_tokenizer
from rlmt.models.vocabulary import check_vocabulary

_NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
_BLOCK, _MAX_BLOCKS = 2**20, 1024
"""Bytes of a block of a weights file, and number of blocks that its fingerprint reads."""


@dataclass(frozen=True)
class LocalModel:
    """A policy whose weights are on this machine or on the hub. Its tokenizer and format are read, its weights not."""

    name: str
    """Name in tables and of its folder among the results."""
    source: str
    """Checkpoint, folder or hub name."""
    assets: str
    """Folder or hub name of the config and the tokenizer: `source`, or the folder beside a checkpoint."""
    format: ThinkingFormat
    """How prompts are rendered and completions split."""
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a sample."""
        return load_stop_token_ids(self.assets, self.tokenizer, self.format)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the weights, the tokenizer, the format or the stop tokens; not with the place of the files.

        Of files above 1 GiB, evenly spaced blocks are read.
        """
        tokenizer: Any = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        parts = [vocabulary, tokenizer.chat_template, self.format.to_dict(), self.stop_token_ids]
        digest = blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16)
        for part in self._weights_digests():
            digest.update(part)
        return digest.hexdigest()

    def _weights_digests(self) -> Iterator[bytes]:
        path = Path(self.source).expanduser()
        if path.is_file():
            yield _file_digest(path)
        elif path.is_dir():
            pattern = "model*.safetensors" if self.assets == self.source else "*"
            for file in sorted(file for file in path.rglob(pattern) if file.is_file()):
                yield file.relative_to(path).as_posix().encode() + _file_digest(file)
        else:
            yield str(getattr(self.config, "_commit_hash", None) or self.source).encode()

    @contextmanager
    def weights(self) -> Iterator[str]:
        """The folder or hub name that transformers loads; a checkpoint is exported to a temporary folder, LoRA merged.

        Raises:
            UserError: The checkpoint cannot be exported.
        """
        if self.assets == self.source:
            yield self.source
            return
        from rlmt.export.checkpoints import write_export

        with temporary_export_folder() as folder:
            write_export(Path(self.source).expanduser(), Path(folder, "policy"))
            yield str(Path(folder, "policy"))


@dataclass(frozen=True)
class EndpointModel:
    """A model behind an OpenAI-compatible endpoint."""

    name: str
    """Name in tables and of its folder among the results."""
    source: str
    """File with the options of the endpoint."""
    endpoint: Endpoint
    format: ThinkingFormat
    """How completions are split. An endpoint that returns the thought in another field, or none, has `no_think`."""

    @property
    def fingerprint(self) -> str:
        """Changes with the model's name, its request options and the format; not with the URL."""
        parts = [self.endpoint.model, self.endpoint.options, self.format.to_dict()]
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


Model = LocalModel | EndpointModel


def resolve_models(sources: Sequence[str], format: FormatName | None = None) -> list[Model]:  # noqa: A002
    """Resolves models, and checks that their names differ.

    Args:
        sources: Models as the user names them; see `resolve_model`.
        format: Thinking format of models that do not store one.

    Raises:
        UserError: As `resolve_model`, or two models have the same name.
    """
    models = [resolve_model(source, format) for source in sources]
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            raise UserError(
                f"{model.source}: another model is named {model.name}, too; name them: NAME={model.source}."
            )
    return models


def resolve_model(source: str, format: FormatName | None = None) -> Model:  # noqa: A002
    """Finds a model's tokenizer and thinking format; no weights are read.

    Args:
        source: Checkpoint of a run, exported folder, Hugging Face folder, hub name, or a YAML file with the options of
            an `Endpoint`; with a name for tables as NAME=SOURCE.
        format: Thinking format; only for models that do not store it.

    Returns:
        The model.

    Raises:
        UserError: It does not exist, is no policy, or its format is not known or another one.
    """
    name, path = None, source
    if (match := _NAMED.fullmatch(source)) and not Path(source).expanduser().exists():
        name, path = match.groups()
    where = Path(path).expanduser()
    if where.suffix in (".yaml", ".yml"):
        return _endpoint_model(name, where, format)
    is_checkpoint = where.is_file() or (where / "meta.pt").is_file()
    if (where / "adapter_config.json").is_file() and not (where / "config.json").is_file():
        raise UserError(f"{path}: is an adapter without its model; export the checkpoint with --what merged.")
    assets = str(where.parent / POLICY_ASSETS) if is_checkpoint else path
    if is_checkpoint and not Path(assets).is_dir():
        raise UserError(
            f"{path}: there is no folder {POLICY_ASSETS} beside it; give a policy's checkpoint where its run wrote it."
        )
    config, tokenizer = load_config(assets), load_tokenizer(assets)
    check_causal_lm(config, path)
    check_vocabulary(tokenizer, config, path)
    found = _find_format(path, Path(assets).expanduser(), tokenizer, format)
    return LocalModel(name or default_name(path, is_checkpoint), path, assets, found, tokenizer, config)


def _find_format(
    source: str, assets: Path, tokenizer: PreTrainedTokenizerBase, name: FormatName | None
) -> ThinkingFormat:
    """The format that a folder stores, or else the one named."""
    if (assets / FILE_NAME).is_file():
        saved = ThinkingFormat.load(assets)
        if name not in (None, saved.name):
            raise UserError(f"{source}: was trained with {saved}; omit --format.")
        check_format(saved, tokenizer, source)
        return saved
    if name is None:
        raise UserError(f"{source}: stores no thinking format ({FILE_NAME} is missing); pass --format.")
    return resolve_format(ThinkingFormat(name), tokenizer, source)


def _endpoint_model(name: str | None, path: Path, format: FormatName | None) -> EndpointModel:  # noqa: A002
    """Reads the options of an endpoint, and optionally its `format`."""
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a YAML file with base_url and model."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({first_line(error)}); write one option per line.") from error
    if not isinstance(options, dict):
        raise UserError(f"{path}: holds no options; write base_url and model, one per line.")
    thinking = options.pop("format", None) or format or "no_think"
    if thinking not in get_args(FormatName):
        raise UserError(f"{path}: format is {thinking!r}; use one of {', '.join(get_args(FormatName))}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Endpoint)
    try:
        endpoint = Endpoint(**parser.parse_object(options).as_dict())
    except ArgumentError as error:
        raise UserError(f"{path}: {first_line(error)}; see the options of an endpoint in the documentation.") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not endpoint.model:
        raise UserError(f"{path}: model is not set; give the model's name at the endpoint.")
    # The server renders the prompt, so an opening tag may be in it.
    split = ThinkingFormat(thinking, prefill=thinking != "no_think")
    return EndpointModel(name or _as_name(endpoint.model.rpartition("/")[2]), str(path), endpoint, split)


def default_name(source: str, is_checkpoint: bool = False) -> str:
    """The name of a model that the user does not name: that of its folder, for a checkpoint with that of its file."""
    path = Path(source).expanduser()
    if not is_checkpoint:
        return _as_name(path.name or path.resolve().name)
    run = [part for part in path.resolve().parent.parts if not re.fullmatch(r"checkpoints|latest|version_\d+|/", part)]
    return _as_name(f"{run[-1]}-{path.stem if path.is_file() else path.name}" if run else path.stem)


def _as_name(text: str) -> str:
    """The text as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "-", text).strip(".-") or "model"


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for start in range(0, size, max(_BLOCK, size // _MAX_BLOCKS)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.digest()


def temporary_export_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for an exported checkpoint."""
    try:
        return tempfile.TemporaryDirectory(prefix="rlmt-policy-")
    except OSError as error:
        raise UserError(
            f"The checkpoint cannot be exported to a temporary folder ({error.strerror or error}); set TMPDIR to a "
            "folder that can be written, or export it with `rlmt export` first."
        ) from error
