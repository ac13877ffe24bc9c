"""Where rows come from: local files, the shipped set or a hub data set; and which of them are used."""

import hashlib
import json
import random
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import limits
from sft.config import schema
from sft.config.data_files import SAVED, TEXT, find_files, find_splits, kind_of, shown_files
from sft.config.patterns import compile_pattern
from sft.config.schema import DatasetSettings
from sft.data.cells import as_text
from sft.data.formatted import formatted, source_hash
from sft.data.readers import hash_file, read_files, with_names
from sft.environment import hub_unreachable
from sft.errors import Refusal, first_line, is_page, refuse


def held_out_data(data: DatasetSettings) -> DatasetSettings | None:
    """The settings by which held-out rows of their own are read; None where they are a part of the others."""
    if data.eval_path:
        return replace(data, path=data.eval_path)
    return replace(data, split=data.eval_split) if data.eval_split else None


def read_rows(data: DatasetSettings, split: str) -> tuple[Sequence[dict], dict[str, Any]]:
    """The rows of local files, the shipped set or a hub data set, and `source_of` them, or {"name", "hash"}."""
    files = _files_of(data)
    if files is None:
        rows, source = _read_hub(data, split)
        return formatted(rows, data), source | {"hash": source_hash(source["hash"], data)}
    rows = read_files(files, split)
    if not len(rows):
        why = "The file holds no rows." if len(files) == 1 else f"The {len(files)} files hold no rows."
        key = "dataset.eval_path" if data.path == data.eval_path else "dataset.path"
        raise refuse(f"{key}={shown_files(data.path)}", why, "write the rows first, or name another file")
    return formatted(rows, data), source_of(replace(data, split=split))


def source_of(data: DatasetSettings) -> dict[str, Any] | None:
    """{"name", "hash"} of local files or the shipped set, of which no row is read, and of several files "files", their names.

    None for a hub data set.
    """
    files = _files_of(data)
    if files is None:
        return None
    splits = any(map(find_splits, files))
    name = str(data.name) if not data.path else shown_files(data.path) + (f" ({data.split})" if splits else "")
    hashes = [_hash_of(file, data.split) for file in files]
    if len(files) == 1:
        return {"name": name, "hash": source_hash(hashes[0], data)}
    return {"name": name, "hash": source_hash(_hash_over(hashes), data), "files": [str(file) for file in files]}


def small_files(data: DatasetSettings, size: int) -> list[Path]:
    """The local files of a data set, if they are text and have at most `size` bytes together; else none."""
    files = _files_of(data) or []
    text = all(file.is_file() and kind_of(file) in TEXT for file in files)
    return files if text and sum(file.stat().st_size for file in files) <= size else []


def _files_of(data: DatasetSettings) -> list[Path] | None:
    if data.path:
        return find_files(data.path)
    return [schema.DATASETS[data.name]] if data.name in schema.DATASETS else None


def _hash_of(file: Path, split: str) -> str:
    """What tells the rows of a file from others: the hash of its bytes, or over those of a saved folder's files."""
    if kind_of(file) == SAVED:
        folder = file / split if find_splits(file) else file
        try:
            named = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
            files = [folder / one["filename"] for one in named] + [folder / "dataset_info.json"]
            return _hash_over([hash_file(one) for one in files])
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"Not a readable folder of save_to_disk: {first_line(error)}."
            raise refuse(str(folder), why, "write it again by save_to_disk") from error
    return hash_file(file)


def _hash_over(hashes: list[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _read_hub(data: DatasetSettings, split: str) -> tuple[Sequence[dict], dict[str, Any]]:
    from datasets import exceptions, load_dataset

    what = f"dataset.name={data.name}"
    try:
        rows = load_dataset(data.name, data.config_name, split=split, revision=data.revision)
    except exceptions.DatasetNotFoundError as error:
        fix = "hf auth login   if the data set is private or gated\ndataset=local dataset.path=...   for a file of your own"
        raise refuse(what, first_line(error), fix) from error
    except (ConnectionError, OSError) as error:
        raise hub_unreachable(what, error, "dataset.path=/path/to/a/file.jsonl") from error
    except ValueError as error:
        if is_page(error):
            raise hub_unreachable(what, error, "dataset.path=/path/to/a/file.jsonl") from error
        raise refuse(f"{what} dataset.split={split}", first_line(error)) from error
    return with_names(rows), {"name": f"{data.name} ({split})", "hash": rows._fingerprint}


def select(rows: Sequence[dict], data: DatasetSettings, seed: int, counts: dict) -> tuple[Sequence[int], Sequence[int]]:
    """Which rows to train on and which to hold out, by their index: filter, shuffle, max_rows, split."""
    index = choose_indices(rows, data, seed)
    counts["filtered"] = len(rows) - len(index)
    if not index:
        fix = "dataset.keep={} dataset.drop={}   to filter nothing"
        raise refuse("dataset.keep / dataset.drop", f"None of the {len(rows)} rows passes the filters.", fix)
    index = index[: data.max_rows]
    held_out = 0
    if data.eval_fraction > 0 and not data.eval_path:
        held_out = max(1, round(len(index) * data.eval_fraction))
        if data.max_eval_rows:
            held_out = min(held_out, data.max_eval_rows)
        if held_out >= len(index):
            why = f"There are {len(index)} rows; holding {held_out} out leaves none to train on."
            raise refuse(f"dataset.eval_fraction={data.eval_fraction}", why, "dataset.eval_fraction=0")
    cut = len(index) - held_out
    return index[:cut], index[cut:]


def name_rows(rows: Sequence[dict], held_out_in: str | None, *numbers: int) -> str:
    """`rows 1 and 2 of the data`, `held-out row 3 of val.jsonl`; of several files with the one of the first row.

    `held_out_in` says where held-out rows are; None for rows to train on.
    """
    *first, last = map(str, numbers)
    listed = f"rows {', '.join(first)} and {last}" if first else f"row {last}"
    text = f"held-out {listed} of {held_out_in}" if held_out_in else f"{listed} of the data"
    place_of = getattr(rows, "place_of", None)
    return f"{text}, {'the first is ' * bool(first)}{place_of(numbers[0] - 1)}" if place_of else text


def choose_indices(rows: Sequence[dict], data: DatasetSettings, seed: int, held_out_in: str | None = None) -> Sequence[int]:
    """Indices of the rows that pass the filters, shuffled by `seed` where `dataset.shuffle` says so; 8 bytes a row.

    `held_out_in` as in `name_rows`.
    """
    index = array("q", range(len(rows)))
    rules = [(column, compile_pattern(pattern, re.S), True) for column, pattern in data.keep.items()]
    rules += [(column, compile_pattern(pattern, re.S), False) for column, pattern in data.drop.items()]
    if rules:
        with limits.seconds_limited() as begin_row:
            index = array("q", (i for i in index if _passes(rows, i, rules, begin_row, held_out_in)))
    if data.shuffle:
        random.Random(seed).shuffle(index)
    return index


def _passes(
    rows: Sequence[dict],
    i: int,
    rules: list[tuple[str, re.Pattern, bool]],
    begin_row: Callable[[], None],
    held_out_in: str | None,
) -> bool:
    begin_row()
    try:
        row = rows[i]
    except Refusal as refusal:
        raise Refusal([replace(problem, what=name_rows(rows, held_out_in, i + 1)) for problem in refusal.problems]) from refusal
    for column, pattern, wanted in rules:
        try:
            if bool(pattern.search(as_text(row.get(column)))) != wanted:
                return False
        except ValueError as error:
            why = f"It cannot be filtered: {first_line(error)}."
            raise refuse(name_rows(rows, held_out_in, i + 1), why, "mend or remove the row") from error
        except limits.OverLimit as error:
            group = "keep" if wanted else "drop"
            why = f"{error} A repetition inside a repetition, as in (a+)+, tries every way to share a text out."
            fix = f"dataset.{group}={{}}   or a pattern without it"
            where = name_rows(rows, held_out_in, i + 1)
            raise refuse(f"dataset.{group}.{column}={pattern.pattern} at {where}", why, fix) from error
    return True
