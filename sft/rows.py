"""Read rows: local files with the line of every mistake, the shipped set, and hub data sets; then choose among them."""

import csv
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

from sft import embedded
from sft.columns import as_text
from sft.errors import first_line, last_line, refuse
from sft.settings import DatasetSettings


def read_rows(data: DatasetSettings, split: str) -> tuple[Sequence[dict], dict[str, str]]:
    """The rows of a local file, the shipped set or a hub data set, and {"name", "hash"} of where they come from."""
    path = Path(data.path).expanduser() if data.path else embedded.DATASETS.get(data.name or "")
    if path is None:
        return _read_hub(data, split)
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    rows = readers[path.suffix.lower()](path)
    if not rows:
        raise refuse(f"dataset.path={path}", "The file holds no rows.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return rows, {"name": str(data.path or data.name), "hash": digest}


def _read_json(path: Path) -> list[dict]:
    text = _read_text(path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        fix = "rename it to .jsonl if every line is a row of its own" if error.msg == "Extra data" else ""
        raise refuse(f"{path}, line {error.lineno}, column {error.colno}", f"Not valid JSON: {error.msg}.", fix) from error
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise refuse(
                str(path), "The file has to hold a list of rows; it holds one object.", "start it with [ and end it with ]"
            )
        rows = rows[lists[0]]
    if not isinstance(rows, list):
        raise refuse(str(path), f"The file has to hold a list of rows; it holds {text.strip()[:60]!r}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise refuse(f"{path}, row {number}", f"A row has to be an object in braces; this is {str(row)[:60]!r}.")
    return rows


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            fix = "rename it to .json if the whole file is one list" if line.strip() in ("[", "{") else ""
            raise refuse(f"{path}, line {number}", f"Not valid JSON: {error.msg} at column {error.colno}.", fix) from error
        if not isinstance(row, dict):
            raise refuse(f"{path}, line {number}", f"A row has to be an object in braces; this is {line[:60]!r}.")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[dict]:
    csv.field_size_limit(2**31 - 1)
    # newline="" leaves line breaks inside quotes alone; only \n and \r end a line, not every break that Unicode knows.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header, rows, line = None, [], 1
    try:
        for cells in reader:
            if not cells:  # a blank line
                pass
            elif header is None:
                header = _check_header([cell.strip() for cell in cells], f"{path}, line {line}")
            elif len(cells) != len(header):
                why = f"{len(header)} columns are expected ({', '.join(header)}); found {len(cells)}."
                raise refuse(f"{path}, line {line}", why, 'put quotes around a value with a comma in it: "a, b"')
            else:
                rows.append(dict(zip(header, cells, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        fix = 'a quote inside a quoted value is written twice: "she said ""yes"""'
        raise refuse(f"{path}, line {line}", f"The row that starts here is not valid CSV: {error}.", fix) from error
    return rows


def _check_header(names: list[str], where: str) -> list[str]:
    """The column names of a CSV file, as they are; refused where a column could not be told from another."""
    if len(names) == 1 and (found := re.search(r"[;\t|]", names[0])):
        why = f"The columns are separated by {found[0]!r} ({names[0]!r}); they have to be separated by commas."
        raise refuse(where, why, "save it with commas, or as jsonl")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise refuse(where, f"The column {twice[0]!r} stands there twice.", "rename one of the two")
    return names


def _read_parquet(path: Path) -> Sequence[dict]:
    from datasets import Dataset
    from pyarrow import ArrowException

    try:
        return Dataset.from_parquet(str(path), cache_dir=str(embedded.cache_dir() / "parquet"))
    except (ArrowException, OSError, ValueError, RuntimeError) as error:
        raise refuse(str(path), f"Not a readable parquet file: {last_line(error)}") from error
    except Exception as error:  # datasets wraps what pyarrow raises in classes of its own
        raise refuse(str(path), f"Not a readable parquet file: {last_line(error.__cause__ or error)}") from error


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        fix = f"iconv -f GB18030 -t UTF-8 {path} > utf8{path.suffix}   if it was written on a Chinese Windows"
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            fix = f"iconv -f UTF-16 -t UTF-8 {path} > utf8{path.suffix}"
        raise refuse(f"{path}, line {line}", "The file is not UTF-8 text.", fix) from error


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
        raise refuse(f"{what} dataset.split={split}", first_line(error)) from error
    return rows, {"name": f"{data.name} ({split})", "hash": rows._fingerprint}


def hub_unreachable(what: str, error: Exception, local: str):
    """The refusal of a download that failed, naming the mirror variable and the local way."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    why = f"The hub at {endpoint} could not be reached: {first_line(error)}"
    fix = "HF_ENDPOINT=https://hf-mirror.com python train.py ...   where only a mirror can be reached"
    fix += f"\n{local}   for a local copy"
    return refuse(what, why, fix)


def select(rows: Sequence[dict], data: DatasetSettings, seed: int, counts: dict) -> tuple[list[int], list[int]]:
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


def choose_indices(rows: Sequence[dict], data: DatasetSettings, seed: int) -> list[int]:
    """Indices of the rows that pass the filters, shuffled by `seed` where `dataset.shuffle` says so."""
    index = list(range(len(rows)))
    rules = [(c, re.compile(p, re.S), True) for c, p in data.keep.items()]
    rules += [(c, re.compile(p, re.S), False) for c, p in data.drop.items()]
    if rules:
        index = [i for i in index if all(bool(p.search(as_text(rows[i].get(c)))) == wanted for c, p, wanted in rules)]
    if data.shuffle:
        random.Random(seed).shuffle(index)
    return index
