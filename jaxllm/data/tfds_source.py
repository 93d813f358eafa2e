"""Data sets that TensorFlow Datasets prepared on disk, read without TensorFlow.

`tfds:NAME[:SPLIT]`. NAME is the data set's folder below `TFDS_DATA_DIR` (or else
`~/tensorflow_datasets`), or any other path: `my_text`, `my_text/plain`, `my_text/plain/1.0.0` or
`/data/my_text/1.0.0`. Left out, the configuration is the default one and the version the newest.
SPLIT is in the syntax of TensorFlow Datasets, `train` if left out: `tfds:my_text:train[:10%]`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxllm.data.records import BadLine, Record
from jaxllm.data.sources import fingerprint_of_files, one_line
from jaxllm.errors import UserError

_ARRAY_RECORD = "array_record"
_INFO = "dataset_info.json"
_FEATURES = "features.json"
_OWN_FEATURES = "tensorflow_datasets."


def tfds_source(entry: str, field: str, parse_special_tokens: bool) -> "TfdsSource":
    """The source of `tfds:NAME[:SPLIT]`; nothing is downloaded.

    Raises:
        UserError: the data set is not prepared on disk as ArrayRecord, or has no such split.
    """
    where = f"config.{field}: {entry}"
    name, _, split = entry.removeprefix("tfds:").partition(":")
    split = split or "train"
    folder = _version_folder(name, where)
    _check_features(folder, where)
    try:
        builder = _builder(folder)
    except Exception as error:
        raise UserError(
            f"{where}: {folder} cannot be read without TensorFlow ({one_line(error)}); prepare it "
            f"with file_format='{_ARRAY_RECORD}'."
        ) from error
    try:
        builder.info.splits[split]
    except Exception as error:
        splits = ", ".join(f"{k} ({v.num_examples})" for k, v in builder.info.splits.items())
        raise UserError(
            f"{where}: there is no split {split}; its splits (examples) are {splits}, and a slice "
            "of one is written train[:10%] or train[100:200]."
        ) from error
    return TfdsSource(entry, parse_special_tokens, folder, split)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared data set; the features of an example are the fields of a record."""

    name: str
    marked: bool
    folder: Path
    """The prepared version, such as `~/tensorflow_datasets/my_text/1.0.0`."""
    split: str

    def fingerprint(self) -> str:
        """Hash of name, version and split, and of each shard what a file's is made of."""
        info = _builder(self.folder).info
        shards = [str(path) for _, split in sorted(info.splits.items()) for path in split.filepaths]
        text = json.dumps([info.full_name, self.split, fingerprint_of_files(shards)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def records(self) -> Iterator[Record | BadLine]:
        """The examples of the split, numbered from 1."""
        builder = _builder(self.folder)
        features = builder.info.features
        for number, example in enumerate(self._examples(builder), start=1):
            try:
                yield Record(_python_value(features, example), self.name, number)
            except UnicodeDecodeError as error:
                yield BadLine(self.name, number, f"not UTF-8 at byte {error.start} of a feature")

    def _examples(self, builder: tfds.core.DatasetBuilder) -> Iterator[dict[str, Any]]:
        read = 0
        try:
            for example in builder.as_data_source(split=self.split):
                yield example
                read += 1
        except Exception as error:  # the readers have no common class of errors
            raise UserError(
                f"{self.name}: was read to example {read} only ({one_line(error)}): a shard is "
                "damaged or cut off, or a feature needs TensorFlow; prepare it again."
            ) from error


def _builder(folder: Path) -> tfds.core.DatasetBuilder:
    return tfds.builder_from_directory(folder, file_format=_ARRAY_RECORD)


def _version_folder(name: str, where: str) -> Path:
    """The folder of a prepared version that `name` stands for.

    Raises:
        UserError: there is none, or several configurations of which none is the default one.
    """
    root = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    folder = root / Path(name).expanduser()  # an absolute path stays as it is
    if not folder.is_dir():
        folder = Path(name)
    if not (name and folder.is_dir()):
        raise UserError(
            f"{where}: no data set {name!r} is prepared in {root}; prepare it there by "
            f"download_and_prepare with file_format='{_ARRAY_RECORD}', set TFDS_DATA_DIR, or give "
            "the path of a prepared version."
        )
    if _is_prepared(folder):
        return folder
    if versions := _versions(folder):
        return versions[-1]
    configs = {child.name: versions for child in folder.iterdir() if (versions := _versions(child))}
    chosen = next(iter(configs)) if len(configs) == 1 else _default_config(folder)
    if chosen in configs:
        return configs[chosen][-1]
    if configs:
        raise UserError(
            f"{where}: name one of its configurations: "
            f"{', '.join(f'tfds:{name}/{config}' for config in sorted(configs))}."
        )
    raise UserError(
        f"{where}: {folder} holds no prepared version; prepare it by download_and_prepare with "
        f"file_format='{_ARRAY_RECORD}'."
    )


def _versions(folder: Path) -> list[Path]:
    """The prepared versions in a folder, oldest first."""
    if not folder.is_dir():
        return []
    versions = [
        child
        for child in folder.iterdir()
        if tfds.core.Version.is_valid(child.name) and _is_prepared(child)
    ]
    return sorted(versions, key=lambda child: tfds.core.Version(child.name))


def _is_prepared(folder: Path) -> bool:
    return (folder / _INFO).is_file() and (folder / _FEATURES).is_file()


def _default_config(folder: Path) -> str:
    try:
        metadata = json.loads((folder / ".config" / "metadata.json").read_bytes())
        return str(metadata["default_config_name"])
    except (OSError, ValueError, KeyError, TypeError):  # it was prepared without
        return ""


def _check_features(folder: Path, where: str) -> None:
    """Refuses features of foreign classes: reading them imports the module that the file names."""
    try:
        features = json.loads((folder / _FEATURES).read_bytes())
        foreign = [name for name in _class_names(features) if not name.startswith(_OWN_FEATURES)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {folder / _FEATURES}: {one_line(error)}.") from error
    if foreign:
        raise UserError(
            f"{where}: {folder / _FEATURES} names {foreign[0]}, code of its own, which is not "
            "run; prepare the data set with features of TensorFlow Datasets."
        )


def _class_names(features: Any) -> Iterator[str]:
    if isinstance(features, dict):
        for key, value in features.items():
            if key == "pythonClassName":
                yield str(value)
            yield from _class_names(value)
    elif isinstance(features, list):
        for value in features:
            yield from _class_names(value)


def _python_value(feature: Any, value: Any) -> Any:
    """A decoded feature as values that JSON could hold.

    Text is a string, a number a number, a sequence a list, and a sequence of dicts, which is
    stored as a dict of columns, a list of dicts.

    Raises:
        UnicodeDecodeError: a string is not UTF-8.
    """
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _python_value(feature[name], item) for name, item in value.items()}
    if isinstance(feature, tfds.features.Dataset):
        return [_python_value(feature.feature, item) for item in value]
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(value, dict):
            rows = zip(*value.values(), strict=True)
            value = [dict(zip(value, row, strict=True)) for row in rows]
        return [_python_value(feature.feature, item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return _decoded(value)


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
