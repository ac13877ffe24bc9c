"""Read files of rows a row at a time: json, jsonl, csv, parquet and arrow, with the line of every mistake.

A text file is read once, to check it and to note where each row begins. After that memory holds 16 bytes a row, whatever
the rows hold: a row is read again from the file when it is asked for.
"""

import codecs
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.data_files import SAVED, kind_of
from sft.errors import Refusal, first_line, last_line, refuse
from sft.storage import cache

CHUNK = 1 << 20
"""Characters of a .json file that are looked at together."""

SPACE = re.compile(r"[ \t\n\r]*")


class FileRows(Sequence):
    """The rows of a text file, each parsed when it is asked for."""

    def __init__(self, path: Path, parse: Callable[[str], dict]):
        self.parse, self.descriptor = parse, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.starts, self.ends = array("q"), array("q")
        self.column_names: dict[str, None] = {}
        """Every column that one of the rows has, in the order they were first seen."""

    def add(self, start: int, end: int, names: Iterable[str]) -> None:
        """Note a row between two places of the file, in bytes, and its columns."""
        self.starts.append(start)
        self.ends.append(end)
        self.column_names.update(dict.fromkeys(names))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict:
        start, end = self.starts[i], self.ends[i]
        return self.parse(os.pread(self.descriptor, end - start, start).decode("utf-8-sig" if start == 0 else "utf-8"))


class JoinedRows(Sequence):
    """The rows of several files one after the other, numbered over all."""

    def __init__(self, parts: list[Sequence[dict]], files: list[Path]):
        self.parts, self.files = parts, files
        self.ends = list(itertools.accumulate(map(len, parts)))
        names = (getattr(part, "column_names", None) or itertools.chain.from_iterable(part) for part in parts)
        self.column_names = dict.fromkeys(itertools.chain.from_iterable(names))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict:
        part, at = self._place(i)
        return self.parts[part][at]

    def _place(self, i: int) -> tuple[int, int]:
        """(the part, the index in it) of a row."""
        part = bisect_right(self.ends, i)  # a part without rows is stepped over
        return part, i - (self.ends[part - 1] if part else 0)

    def place_of(self, i: int) -> str:
        """The file of a row and its number there."""
        part, at = self._place(i)
        return f"row {at + 1} of {self.files[part]}"


class NamedRows(Sequence):
    """Rows of the datasets library in which a number that stands for a label is read as the label's name."""

    def __init__(self, rows: Any, readers: dict[str, Callable[[Any], Any]]):
        self.rows, self.readers, self.column_names = rows, readers, rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        return row | {name: read(row[name]) for name, read in self.readers.items()}


def read_files(files: list[Path], split: str) -> Sequence[dict]:
    """The rows of all files; of a saved DatasetDict those of `split`. Raises Refusal, with the line of what is wrong."""
    _allow_open_files(len(files))
    try:
        parts = [_read_file(file, split) for file in files]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        why = f"This system lets a process open {resource.getrlimit(resource.RLIMIT_NOFILE)[1]} files at most."
        raise refuse(f"{len(files)} files", why, "write the rows into fewer files") from error
    return parts[0] if len(parts) == 1 else JoinedRows(parts, files)


def _allow_open_files(count: int) -> None:
    """Let this process open `count` files more; each stays open as long as its rows are in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count > 50 and soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with contextlib.suppress(OSError, ValueError):  # then reading says so
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _read_file(path: Path, split: str) -> Sequence[dict]:
    kind = kind_of(path)
    if kind == SAVED:
        return _read_saved(path / split if (path / "dataset_dict.json").is_file() else path)
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet, ".arrow": _read_arrow}
    if not kind.endswith(".gz"):
        return readers[kind](path)
    kind = kind.removesuffix(".gz")
    plain = _made_once(path, f"rows{kind}", _unpack)
    try:
        return readers[kind](plain)
    except Refusal as refusal:
        raise Refusal([replace(p, what=p.what.replace(str(plain), str(path))) for p in refusal.problems]) from refusal


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made_once(path: Path, name: str, make: Callable[[Path, Path], None]) -> Path:
    """A file in the cache that `make(path, file)` writes, once for all files of these bytes."""
    place = f"unpacked/{hash_file(path)}{Path(name).suffix}"
    try:
        return cache.made_once(place, lambda folder: make(path, folder / name)) / name
    except OSError as error:
        why = f"It cannot be unpacked into the cache, {cache.cache_dir()}: {first_line(error)}."
        raise refuse(str(path), why, "SFT_CACHE=<a folder with room for it>   before the command") from error


def _unpack(path: Path, plain: Path) -> None:
    """Write what a .gz file holds. Raises Refusal where it is damaged."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed:
        fix = f"mv {shlex.quote(str(path))} {shlex.quote(str(path)[:-3])}   if it was unpacked already"
        raise refuse(str(path), "The file is not gzip, whatever its name says.", fix)
    with open(plain, "wb") as target:
        try:
            with gzip.open(path) as source:
                shutil.copyfileobj(source, target, CHUNK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            fix = "fetch or write it again; gzip -t tells whether it is whole"
            raise refuse(str(path), f"The gzip file is damaged: {first_line(error)}.", fix) from error


# ----------------------------------------------------------------------------------------------------------- jsonl


def _read_jsonl(path: Path) -> FileRows:
    rows, start = FileRows(path, json.loads), 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, path, number)
            if line.strip():
                rows.add(start, start + len(raw), _parse_line(line, path, number).keys())
            start += len(raw)
    return rows


def _parse_line(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        fix = "rename it to .json if the whole file is one list" if line.strip() in ("[", "{") else ""
        raise refuse(f"{path}, line {number}", f"Not valid JSON: {error.msg} at column {error.colno}.", fix) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or a thousand brackets
        raise refuse(f"{path}, line {number}", f"JSON that cannot be read: {first_line(error)}.", "remove the row") from error
    if not isinstance(row, dict):
        raise refuse(f"{path}, line {number}", f"A row has to be an object in braces; this is {line[:60]!r}.")
    return row


# ------------------------------------------------------------------------------------------------------------ json


def _read_json(path: Path) -> Sequence[dict]:
    """A list of objects is read a row at a time; whatever else the file holds as a whole, which also finds what is wrong."""
    rows = FileRows(path, json.loads)
    try:
        with open(path, "rb") as file:
            for start, end, row in _elements(file):
                rows.add(start, end, row.keys())
    except (ValueError, AttributeError, RecursionError):  # not a list, not objects, not JSON, not UTF-8
        return _read_whole_json(path)
    return rows


def _elements(file: io.BufferedReader) -> Iterator[tuple[int, int, dict]]:
    """(first byte, byte behind the last, value) of every object of the list that a .json file holds. Raises ValueError."""
    text = _Text(file)
    text.take("[")
    ended = text.next() == "]"
    if ended:
        text.take("]")
    while not ended:
        if text.next() != "{":
            raise ValueError("a row has to be an object")
        start, row = text.byte, text.value()
        yield start, text.byte, row
        ended = text.take(",]") == "]"
    if text.next():
        raise ValueError("something stands behind the list")


class _Text:
    """The text of a .json file, of which a part is in memory, and where in it we are."""

    def __init__(self, file: io.BufferedReader):
        self.file, self.decode = file, codecs.getincrementaldecoder("utf-8")().decode
        self.scan = json.JSONDecoder().raw_decode
        self.part, self.at, self.over = "", 0, False
        self.byte = 0
        """Where in the file the character at `at` begins."""
        if self._more() and self.part.startswith("\ufeff"):
            self._go(1)

    def _more(self) -> bool:
        """Read on, as much again as there is, so that a long row is not begun too often; False at the end."""
        if self.over:
            return False
        raw = self.file.read(max(CHUNK, len(self.part) - self.at))
        self.over = not raw
        self.part, self.at = self.part[self.at :] + self.decode(raw, self.over), 0
        return True

    def _go(self, to: int) -> None:
        self.byte += len(self.part[self.at : to].encode())
        self.at = to

    def next(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            self._go(SPACE.match(self.part, self.at).end())
            if self.at < len(self.part):
                return self.part[self.at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Step over the next character that is no space, which has to be one of `wanted`."""
        found = self.next()
        if not found or found not in wanted:
            raise ValueError(f"{found!r} where one of {wanted!r} has to be")
        self._go(self.at + 1)
        return found

    def value(self) -> dict:
        """Step over the object that begins here, and return it."""
        while True:
            try:
                value, end = self.scan(self.part, self.at)
                break
            except json.JSONDecodeError:
                if not self._more():
                    raise
        self._go(end)
        return value


def _read_whole_json(path: Path) -> list[dict]:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        fix = "rename it to .jsonl if every line is a row of its own" if error.msg == "Extra data" else ""
        raise refuse(f"{path}, line {error.lineno}, column {error.colno}", f"Not valid JSON: {error.msg}.", fix) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or a thousand brackets
        raise refuse(
            str(path), f"JSON that cannot be read: {first_line(error)}.", "rename it to .jsonl to see the row"
        ) from error
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


# ------------------------------------------------------------------------------------------------------------- csv


def _read_csv(path: Path) -> FileRows:
    csv.field_size_limit(2**31 - 1)
    header: list[str] = []

    def parse(text: str) -> dict:
        # newline="" leaves line breaks inside quotes alone.
        return dict(zip(header, next(csv.reader(io.StringIO(text, newline=""), strict=True)), strict=True))

    rows, place, line, first = FileRows(path, parse), _Place(), 1, 0
    with open(path, "rb") as file:
        reader = csv.reader(_lines(file, path, place), strict=True)
        try:
            for cells in reader:
                if not cells:  # a blank line
                    pass
                elif not header:
                    header += _check_header([cell.strip() for cell in cells], path, line)
                elif len(cells) != len(header):
                    why = f"{len(header)} columns are expected ({', '.join(header)}); found {len(cells)}."
                    raise refuse(f"{path}, line {line}", why, 'put quotes around a value with a comma in it: "a, b"')
                else:
                    rows.add(first, place.byte, header)
                line, first = reader.line_num + 1, place.byte
        except csv.Error as error:
            if not header:
                _check_separator(_first_line_of(path), path, line)
            fix = 'a quote inside a quoted value is written twice: "she said ""yes"""'
            raise refuse(f"{path}, line {line}", f"The row that starts here is not valid CSV: {error}.", fix) from error
    return rows


class _Place:
    byte = 0
    """How much of the file was read; between two rows: where the second one begins."""


def _lines(file: io.BufferedReader, path: Path, place: _Place) -> Iterator[str]:
    r"""The lines of a CSV file with their ends: only \n and \r end one, not every break that Unicode knows."""
    for number, raw in enumerate(file, 1):
        for piece in raw.splitlines(keepends=True):
            place.byte += len(piece)
            yield _decode(piece, path, number)


def _check_header(names: list[str], path: Path, line: int) -> list[str]:
    """The column names of a CSV file, as they are; refused where a column could not be told from another."""
    if len(names) == 1:
        _check_separator(names[0], path, line)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise refuse(f"{path}, line {line}", f"The column {twice[0]!r} stands there twice.", "rename one of the two")
    return names


def _check_separator(header: str, path: Path, line: int) -> None:
    """Refuse a header whose columns something else than commas separates; what stands in quotes is no separator."""
    found = re.search(r"[;\t|]", re.sub(r'"(?:[^"]|"")*"', "", header))
    if found:
        why = f"The columns are separated by {found[0]!r} ({header.strip()!r}); they have to be separated by commas."
        code = "import csv, sys; csv.writer(open(sys.argv[2], 'w', newline='')).writerows(csv.reader(open(sys.argv[1], "
        code += f"encoding='utf-8-sig', newline=''), delimiter={found[0]!r}))"
        fix = f'save it with commas, or as jsonl:\npython -c "{code}" {shlex.quote(str(path))} commas.csv'
        raise refuse(f"{path}, line {line}", why, fix)


def _first_line_of(path: Path) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return next((line for line in file if line.strip()), "")


# ------------------------------------------------------------------------------------------- parquet, arrow, and encodings


def _read_parquet(path: Path) -> Sequence[dict]:
    """Copied once into an Arrow file in the cache, which is mapped into memory."""
    from datasets import Dataset
    from pyarrow.parquet import read_metadata

    with _readable(path, "parquet file"):
        if not read_metadata(path).num_rows:
            return []
        return with_names(Dataset.from_parquet(str(path), cache_dir=str(cache.cache_dir() / "parquet")))


def _read_arrow(path: Path) -> Sequence[dict]:
    """Mapped into memory; the form that can be read from its end is written anew as a stream, once, in the cache."""
    from datasets import Dataset

    with _readable(path, "arrow file"):
        with open(path, "rb") as file:
            stream = file.read(6) != b"ARROW1"
        return with_names(Dataset.from_file(str(path if stream else _made_once(path, "rows.arrow", _to_stream))))


def _to_stream(path: Path, stream: Path) -> None:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:  # noqa: SIM117
        with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, reader.schema) as writer:
            for number in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(number))


def _read_saved(folder: Path) -> Sequence[dict]:
    """What `save_to_disk` of the datasets library wrote, without the format that was set for its rows."""
    from datasets import load_from_disk

    with _readable(folder, "folder of save_to_disk"):
        return with_names(load_from_disk(str(folder)).with_format(None))


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Refuse whatever pyarrow and the datasets library raise for damaged files."""
    from pyarrow import ArrowException

    try:
        yield
    except Refusal:
        raise
    except (ArrowException, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            raise
        raise refuse(str(path), f"Not a readable {what}: {last_line(error)}") from error
    except Exception as error:  # datasets wraps what pyarrow raises in classes of its own
        raise refuse(str(path), f"Not a readable {what}: {last_line(error.__cause__ or error)}") from error


def with_names(rows: Any) -> Sequence[dict]:
    """Rows of the datasets library with the names of their labels in place of numbers."""
    readers = {name: read for name, feature in rows.features.items() if (read := _names_in(feature, name))}
    return NamedRows(rows, readers) if readers else rows


def _names_in(feature: Any, column: str) -> Callable[[Any], Any] | None:
    """What puts names for the numbers of the labels in a value of this feature; None where it holds no label."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return lambda value: _name_of(value, feature.names, column)
    if isinstance(feature, dict):
        inner = {key: read for key, one in feature.items() if (read := _names_in(one, column))}
        return (lambda value: value and value | {key: read(value[key]) for key, read in inner.items()}) if inner else None
    each = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)  # a list of whatever length
    read = None if each is None else _names_in(each, column)
    return (lambda value: value and [read(one) for one in value]) if read else None


def _name_of(value: int | None, names: list[str], column: str) -> str | None:
    """A label's name; null where the row has none, which the datasets library writes as -1."""
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        why = f"{value} is the number of no label of the column {column!r}, which has {len(names)}."
        raise refuse("", why, "mend or remove the row")
    return names[value]


def _decode(raw: bytes, path: Path, line: int = 1) -> str:
    """`raw`, which begins at `line` of the file, as text. Raises Refusal with the way out where it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        file = shlex.quote(str(path))
        fix = f"iconv -f GB18030 -t UTF-8 {file} > utf8{path.suffix}   if it was written on a Chinese Windows"
        with open(path, "rb") as opened:
            first = opened.read(2)
        if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            fix = f"iconv -f UTF-16 -t UTF-8 {file} > utf8{path.suffix}"
        raise refuse(f"{path}, line {line}", "The file is not UTF-8 text.", fix) from error
