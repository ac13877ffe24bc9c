"""Where rows come from: a local file, the shipped set or a hub data set; and which of them are used."""

import hashlib
import random
import re
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from sft import limits
from sft.config import schema
from sft.config.schema import DatasetSettings
from sft.data.columns import as_text
from sft.data.readers import read_file
from sft.environment import hub_unreachable
from sft.errors import first_line, is_page, refuse


def read_rows(data: DatasetSettings, split: str) -> tuple[Sequence[dict], dict[str, str]]:
    """The rows of a local file, the shipped set or a hub data set, and {"name", "hash"} of where they come from."""
    path = _path_of(data)
    if path is None:
        return _read_hub(data, split)
    return read_file(path), source_of(data)


def source_of(data: DatasetSettings) -> dict[str, str] | None:
    """{"name", "hash"} of a local file or the shipped set, of which no row is read; None for a hub data set."""
    path = _path_of(data)
    if path is None:
        return None
    with open(path, "rb") as file:
        return {"name": str(data.path or data.name), "hash": hashlib.file_digest(file, "sha256").hexdigest()}


def _path_of(data: DatasetSettings) -> Path | None:
    return Path(data.path).expanduser() if data.path else schema.DATASETS.get(data.name or "")


def _read_hub(data: DatasetSettings, split: str) -> tuple[Sequence[dict], dict[str, str]]:
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
    return rows, {"name": f"{data.name} ({split})", "hash": rows._fingerprint}


def select(rows: Sequence[dict], data: DatasetSettings, seed: int, counts: dict) -> tuple[Sequence[int], Sequence[int]]:
    """Which rows to train on and which to hold out, by their index: filter, shuffle, max_rows, split."""
    index = choose_indices(rows, data, seed)
    counts["filtered"] = len(rows) - len(index)
    if not index:
        fix = "dataset.keep={} dataset.drop={}   to filter nothing"
        raise refuse("dataset.keep / dataset.drop", f"None of the {len(rows)} rows passes the filters.", fix)
    index = index[: data.max_rows]
    held_out = 0
    if data.eval_fraction > 0:
        held_out = max(1, round(len(index) * data.eval_fraction))
        if data.max_eval_rows:
            held_out = min(held_out, data.max_eval_rows)
        if held_out >= len(index):
            why = f"There are {len(index)} rows; holding {held_out} out leaves none to train on."
            raise refuse(f"dataset.eval_fraction={data.eval_fraction}", why, "dataset.eval_fraction=0")
    cut = len(index) - held_out
    return index[:cut], index[cut:]


def choose_indices(rows: Sequence[dict], data: DatasetSettings, seed: int) -> Sequence[int]:
    """Indices of the rows that pass the filters, shuffled by `seed` where `dataset.shuffle` says so; 8 bytes a row."""
    index = array("q", range(len(rows)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of brackets in brackets
        rules = [(column, re.compile(pattern, re.S), True) for column, pattern in data.keep.items()]
        rules += [(column, re.compile(pattern, re.S), False) for column, pattern in data.drop.items()]
    if rules:
        with limits.seconds_limited() as begin_row:
            index = array("q", (i for i in index if _passes(rows[i], i, rules, begin_row)))
    if data.shuffle:
        random.Random(seed).shuffle(index)
    return index


def _passes(row: dict, i: int, rules: list[tuple[str, re.Pattern, bool]], begin_row: Callable[[], None]) -> bool:
    begin_row()
    for column, pattern, wanted in rules:
        try:
            if bool(pattern.search(as_text(row.get(column)))) != wanted:
                return False
        except ValueError as error:
            why = f"It cannot be filtered: {first_line(error)}."
            raise refuse(f"row {i + 1} of the data", why, "mend or remove the row") from error
        except limits.OverLimit as error:
            group = "keep" if wanted else "drop"
            why = f"{error} A repetition inside a repetition, as in (a+)+, tries every way to share a text out."
            fix = f"dataset.{group}={{}}   or a pattern without it"
            raise refuse(f"dataset.{group}.{column}={pattern.pattern} at row {i + 1} of the data", why, fix) from error
    return True
