"""Reads datasets that have splits and subsets: folders of data files, folders of `save_to_disk`, and the Hub.

The `datasets` library decides which files of a folder belong to which split and subset, as on the Hub: by their names
(`train-00000-of-00002.parquet`) or by the `configs` in the metadata of README.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlmt.data.table_files import READERS, Rows, SelectColumns, read_file
from rlmt.errors import UserError, first_line

if TYPE_CHECKING:
    import datasets

_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""JSON files that describe a dataset."""
_MAX_NAMES = 20
"""Number of splits or subsets that an error message lists."""

T = TypeVar("T")


@dataclass(frozen=True)
class DataSource:
    """Where rows are read from. Its text is its name, for messages."""

    name: str
    """A file, a folder or the name of a Hub dataset."""
    split: str | None = None
    """Split of a folder or Hub dataset; None takes `train`, or the only one."""
    subset: str | None = None
    """Subset (configuration) of a folder or Hub dataset; None takes the only one, or the default."""

    def __str__(self) -> str:
        return self.name


def held_out_source(training: DataSource, name: str | None, split: str | None) -> DataSource | None:
    """The source of validation rows, or None if they are split off the training rows.

    Args:
        training: The source of training rows.
        name: File, folder or Hub name of validation rows; None takes another split of `training`.
        split: Split of the validation rows; None takes `train`, or the only one.
    """
    if name is None and split is None:
        return None
    same = name in (None, training.name)
    return DataSource(name or training.name, split, training.subset if same else None)


def read_folder(source: DataSource, folder: Path, select_columns: SelectColumns) -> Rows:
    """Reads one split of a folder of data files, or of a folder that `save_to_disk` wrote.

    Args:
        source: The source that names the folder.
        folder: The folder.
        select_columns: Selects the columns to read.

    Returns:
        The rows, file after file.

    Raises:
        UserError: The folder has no such split or subset, no data files, files that belong to no split, or files that
            cannot be read; or `select_columns` raises.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(source, folder, select_columns)
    files = _choose_split(source, _files_by_split(source, folder))
    return [
        (f"{path.name} {place}", cells) for path in map(Path, files) for place, cells in read_file(path, select_columns)
    ]


def read_hub(source: DataSource, select_columns: SelectColumns) -> Rows:
    """Reads one split of a dataset on the Hugging Face Hub.

    Args:
        source: The source that names the dataset.
        select_columns: Selects the columns to read.

    Returns:
        The rows.

    Raises:
        UserError: The dataset cannot be loaded, or has no such split or subset; or `select_columns` raises.
    """
    import datasets

    try:
        splits: Any = datasets.load_dataset(source.name, source.subset)
    except Exception as error:  # the Hub client raises errors of many libraries; all mean the same to the user
        _check_subset(source, error)
        if isinstance(error, PermissionError):
            raise UserError(
                f"{source}: the hub's cache cannot be written ({error.filename}: {error.strerror}); set HF_HOME to a "
                "folder that can."
            ) from error
        raise UserError(
            f"{source} is not a file and cannot be loaded as a Hub dataset: {first_line(error)}; check the name and "
            "the network, or pass a file."
        ) from error
    return _rows(_choose_split(source, splits), select_columns)


def _read_saved(source: DataSource, folder: Path, select_columns: SelectColumns) -> Rows:
    """Reads a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    if source.subset is not None:
        raise UserError(f"--data.subset {source.subset}: {source} is a saved dataset without subsets; leave it out.")
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and file errors
        raise UserError(
            f"{source} is not a complete dataset of save_to_disk: {first_line(error)}; save it again."
        ) from (error)
    if isinstance(saved, datasets.DatasetDict):
        return _rows(_choose_split(source, saved), select_columns)
    if source.split is not None:
        raise UserError(f"--data.split {source.split}: {source} is a saved dataset without splits; leave it out.")
    return _rows(saved, select_columns)


def _rows(table: datasets.Dataset, select_columns: SelectColumns) -> Rows:
    columns = list(select_columns(table.column_names))
    return [(f"row {number}", row) for number, row in enumerate(table.select_columns(columns).to_list(), start=1)]


def _files_by_split(source: DataSource, folder: Path) -> dict[str, list[str]]:
    """The data files of each split of a folder."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from huggingface_hub import DatasetCard

    try:
        with tempfile.TemporaryDirectory(prefix="rlmt-datasets-") as cache:
            builder = datasets.load_dataset_builder(str(folder.resolve()), source.subset, cache_dir=cache)
    except EmptyDatasetError as error:
        raise UserError(f"{source} is a folder without data files; use {', '.join(READERS)} files.") from error
    except (ValueError, OSError) as error:
        _check_subset(source, error)
        raise UserError(f"{source} is not a folder of data files: {first_line(error)}; pass a file in it.") from error
    splits = {str(split): sorted(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    card = folder / "README.md"
    if not (card.is_file() and DatasetCard.load(card).data.to_dict().get("configs")):
        used = {Path(path) for files in splits.values() for path in files}
        _check_all_used(source, folder.resolve(), used, list(splits))
    return splits


def _check_all_used(source: DataSource, folder: Path, used: set[Path], splits: list[str]) -> None:
    """Raises UserError for data files that belong to no split, which would be left out silently."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in READERS and path.is_file())
    hidden = (".", "__")
    visible = [path for path in files if not any(p.startswith(hidden) for p in path.relative_to(folder).parts)]
    unused = [path for path in visible if path not in used and path.name not in _NOT_DATA]
    if unused:
        raise UserError(
            f"{source}: {unused[0].relative_to(folder)} belongs to none of the splits {_names(splits)}, which the "
            "names of the other files define; rename or move it, or pass a single file."
        )


def _choose_split(source: DataSource, splits: Mapping[Any, T]) -> T:
    """The requested split, else `train`, else the only one."""
    by_name = {str(name): split for name, split in splits.items()}
    name = source.split or ("train" if "train" in by_name or len(by_name) != 1 else next(iter(by_name)))
    if name not in by_name:
        subject = (
            f"--data.split {name}: {source} has no such split" if source.split else f"{source} has no 'train' split"
        )
        raise UserError(f"{subject}, only {_names(by_name)}; set --data.split to one of them.")
    return by_name[name]


def _check_subset(source: DataSource, error: Exception) -> None:
    """Raises UserError if the error of the `datasets` library means that a subset has to be named, or is unknown."""
    import datasets

    message = str(error)
    if not (isinstance(error, ValueError) and ("Config name is missing" in message or "BuilderConfig" in message)):
        return
    path = Path(source.name).expanduser()
    names = datasets.get_dataset_config_names(str(path.resolve()) if path.is_dir() else source.name)
    subject = f"{source} has several subsets" if source.subset is None else f"--data.subset {source.subset}: unknown"
    raise UserError(f"{subject}; set --data.subset to one of {_names(names)}.") from error


def _names(names: Any) -> str:
    listed = sorted(map(repr, map(str, names)))
    more = f" and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return ", ".join(listed[:_MAX_NAMES]) + more
