"""`dataset.format`: rows as a function of the user's own makes them of those of the file."""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from sft import limits
from sft.config.own_code import contents_hash, line_of, own_function, run_file
from sft.config.schema import DatasetSettings
from sft.errors import Problem, Refusal, first_line, refuse

TRIED = 3
"""Rows that the function is tried on before any other work."""


class FormattedRows(Sequence):
    """The rows of `rows`, each given to `function` when it is asked for; numbered as they are in the file.

    A row that the function cannot take raises Refusal where it is read, as a damaged line of a file does.
    """

    def __init__(self, rows: Sequence[dict], function: Callable[[dict], Any], file: str, data: DatasetSettings):
        self.rows, self.function, self.file = rows, function, file
        self.name, self.messages = data.format, data.columns.messages
        self.place_of = getattr(rows, "place_of", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = dict(self.rows[i])
        try:
            made = self.function(row)
        except limits.OverLimit as error:
            raise self._fault(f"it {str(error)[3:].removesuffix('.')}", "") from error
        except (Exception, SystemExit) as error:
            raise self._fault(f"it raised {type(error).__name__}: {first_line(error)}", line_of(error, self.file)) from error
        if isinstance(made, list) and made:
            return {self.messages: made}
        if isinstance(made, dict) and made and all(isinstance(key, str) for key in made):
            return made
        shown = f"{made!r}"[:40]
        raise self._fault(f"it returned {shown}, not a list of messages or a row", "")

    def _fault(self, why: str, line: str) -> Refusal:
        return refuse("", f"dataset.format={self.name} cannot take it: {why}.", f"mend {line or self.file}")

    @functools.cached_property
    def column_names(self) -> list[str]:
        """The columns that one of the rows comes to have; the function is called with each row for it."""
        names: dict[str, None] = {}
        with limits.seconds_limited() as begin_row:
            for i in range(len(self)):
                begin_row()
                with contextlib.suppress(Refusal):  # raised again where the row is rendered, with all others
                    names.update(dict.fromkeys(self[i]))
        return list(names)


def formatted(rows: Sequence[dict], data: DatasetSettings) -> Sequence[dict]:
    """`rows` as `dataset.format` makes them; as they are without one. Runs the user's file.

    Raises Refusal if the file cannot be run, the function takes none of the first rows, or returns another row the second time.
    """
    own = own_function(data.format) if data.format else None
    if own is None:
        return rows
    file, what = str(own.file.resolve()), f"dataset.format={data.format}"
    module = run_file(own.file.resolve(), what)
    if isinstance(module, Problem):
        raise Refusal([module])
    function = getattr(module, own.function, None)
    form = f"write def {own.function}(row): in {own.file}"
    if not callable(function):
        why = f"{own.function} is no function." if hasattr(module, own.function) else f"The file has no {own.function}."
        raise refuse(what, why, form)
    if inspect.iscoroutinefunction(function):
        raise refuse(what, "It is async, and rows are read one after another.", form)
    with contextlib.suppress(ValueError):  # of a builtin, whose parameters cannot be read
        try:
            inspect.signature(function).bind({})
        except TypeError:
            raise refuse(what, f"It takes {inspect.signature(function)}; it is given one row, a dict.", form) from None
    made = FormattedRows(rows, function, file, data)
    _try(made, what)
    return made


def _try(rows: FormattedRows, what: str) -> None:
    """Call the function twice with each of the first rows."""
    faults = []
    with limits.seconds_limited() as begin_row:
        for i in range(min(TRIED, len(rows))):
            begin_row()
            try:
                one, two = rows[i], rows[i]
            except Refusal as refusal:
                faults.append(refusal)
                continue
            if one != two:
                why = f"Of row {i + 1} it makes another row the second time, so that a run could not be repeated or resumed."
                raise refuse(what, why, f"draw by something of the row in {rows.file}, not by chance")
    if faults and len(faults) == min(TRIED, len(rows)):
        raise Refusal([Problem(f"{what} at row 1", p.why, p.fix) for p in faults[0].problems])


def source_hash(known: str, data: DatasetSettings) -> str:
    """The hash of rows together with that of the function that they are given to; as it is without one."""
    own = own_function(data.format) if data.format else None
    if own is None:
        return known
    return hashlib.sha256(f"{known}\n{contents_hash(own.file)}\n{own.function}".encode()).hexdigest()
