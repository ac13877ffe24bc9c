"""Which files `dataset.path` and `dataset.eval_path` name: a file, a folder, a glob, or a list of them.

Imports nothing heavy; of the files no row is read.
"""

import glob
import itertools
import json
import re
from pathlib import Path

from sft.paths import expanded

KINDS = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".json.gz", ".jsonl.gz", ".csv.gz")
"""Endings of files that are read."""

TEXT = (".json", ".jsonl", ".csv")
"""Those that are read without another library."""

SAVED = "save_to_disk folder"
"""The kind of a folder that the datasets library wrote."""

TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])")

HELD_OUT = [
    re.compile(rf"(?<![a-z])({words})(?![a-z])") for words in ("validation|valid|val|dev", "test|testing|eval|evaluation")
]
"""Names of splits, as the datasets library reads them from the names of files; the better one to hold out comes first."""


def find_files(value: str | list[str]) -> list[Path]:
    """The files, and folders of `save_to_disk`, that a path names, in the order in which they are read."""
    return [file for text in ([value] if isinstance(value, str) else value) for file in list_files(text)[0]]


def list_files(text: str) -> tuple[list[Path], list[Path]]:
    """What a file, a folder or a glob names in natural order, and what else it holds or matches that is not read.

    A folder's hidden files, and those of folders in it, are neither.
    """
    path = expanded(text)
    if path.is_dir() and not is_saved(path):
        found = [inner for inner in path.iterdir() if not inner.name.startswith(".")]
        files = [inner for inner in found if not inner.is_dir() and kind_of(inner)]
    elif path.exists():
        return [path], []
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in found if kind_of(match)]
    return sorted(files, key=_natural), sorted(set(found) - set(files), key=_natural)


def _natural(path: Path) -> list:
    """A key that puts part-2 before part-10."""
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d+)", part))] for part in path.parts]


def kind_of(path: Path) -> str:
    """The ending of KINDS that a file has, or SAVED; empty for whatever else."""
    if path.is_dir():
        return SAVED if is_saved(path) else ""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), "")


def is_saved(folder: Path) -> bool:
    """Whether the datasets library wrote this folder by `save_to_disk`."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def find_splits(path: Path) -> list[str] | None:
    """The splits of a saved DatasetDict; None for every other file or folder. Raises ValueError where they cannot be read."""
    file = path / "dataset_dict.json"
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not isinstance(facts.get("splits"), list):
        raise ValueError("dataset_dict.json names no splits")
    return [str(name) for name in facts["splits"]]


def shown_files(value: str | list[str]) -> str:
    """What a path names, for a line of text."""
    texts = [value] if isinstance(value, str) else value
    files = len(find_files(value))
    if len(texts) > 1:
        return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
    return texts[0] if find_files(value) == [expanded(texts[0])] else f"{texts[0]} ({files} files)"


def naming(files: list[Path]) -> str | list[str]:
    """A path that names these files and no other: a file, else a glob, else the list of them."""
    if len(files) == 1:
        return str(files[0])
    folder, kind = files[0].parent, kind_of(files[0])
    letters = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*(file.name for file in files), strict=False))
    common = "".join(each[0] for each in letters)
    for start in ("", common):
        pattern = str(Path(glob.escape(str(folder))) / f"{glob.escape(start)}*{kind if kind in KINDS else ''}")
        if list_files(pattern)[0] == files:
            return pattern
    return [str(file) for file in files]


def by_split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Files whose names are those of a training split, and those of a split to hold out; empty where one of them is missing."""
    train = [file for file in files if TRAIN.search(file.name.lower())]
    for pattern in HELD_OUT:
        if held_out := [file for file in files if file not in train and pattern.search(file.name.lower())]:
            return (train, held_out) if train else ([], [])
    return [], []
