"""Rules for the data's settings: where the rows come from, which columns they have, and how they become a text.

Imports neither torch nor transformers; the rows themselves are not read.
"""

import difflib
import functools
import glob
import os
import re
import shlex
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sft.config import schema
from sft.config.data_files import KINDS, SAVED, by_split, find_files, find_splits, kind_of, list_files, naming
from sft.config.keys import typed
from sft.config.own_code import check_own, own_function
from sft.config.patterns import pattern_fault
from sft.config.schema import DatasetSettings
from sft.errors import Problem
from sft.paths import expanded

ANSWER_ROLES = ("output", "completion")


def check_dataset(data: DatasetSettings) -> list[Problem]:
    """What is wrong with where the rows come from, their columns, their template and their filters."""
    problems = []
    if data.path is not None:
        problems += _check_paths("path", data, [])
    elif not data.name:
        why = "Neither a local file nor a hub data set is named."
        problems.append(Problem("dataset.path=null dataset.name=null", why, "dataset.path=my_data.jsonl"))
    if data.format is not None:
        problems += _check_format(data.format)
    problems += _check_held_out(data, readable=not problems)
    problems += _check_columns(data)
    problems += _check_template(data)
    for group in ("keep", "drop"):
        for column, pattern in getattr(data, group).items():
            if fault := pattern_fault(pattern):
                quoted = re.escape(pattern).replace('"', '\\"')
                fix = shlex.quote(f'dataset.{group}.{column}="{quoted}"') + "   for these very characters"
                problems.append(Problem(f"dataset.{group}.{column}={pattern}", fault, fix))
    return problems


def _check_format(text: str) -> list[Problem]:
    """What is wrong with `dataset.format`; its file is parsed and not run."""
    what = typed("dataset.format", text)
    own = own_function(text)
    if own is None:
        return [
            Problem(what, "A function of your own is named by its file and its name.", "dataset.format=rows.py:to_messages")
        ]
    return check_own(own, what, "row", lambda other: typed("dataset.format", other))


def _check_columns(data: DatasetSettings) -> list[Problem]:
    """Two roles of one shape on one column: an answer that stands in its own question, or a question asked twice."""
    problems = []
    for one, other in (("instruction", "input"), ("instruction", "output"), ("input", "output"), ("prompt", "completion")):
        column = getattr(data.columns, one)
        if column and column == getattr(data.columns, other):
            what = f"dataset.columns.{one}={column} dataset.columns.{other}={column}"
            if other == "input":
                why, fix = "The question would be asked twice.", "dataset.columns.input=null"
            else:
                why, fix = (
                    "The answer would stand in its own question.",
                    f"dataset.columns.{one}=<the column with the questions>",
                )
            problems.append(Problem(what, why, fix))
    return problems


def why_lost(path_text: str) -> str:
    """Why the system cannot even look a path up; an empty text where it can."""
    path = expanded(path_text)
    try:
        there = path.exists()
    except OSError as error:
        return f"The system cannot look it up: {error.strerror}."
    unknown = str(path).startswith("~") and not there
    return "There is no such user, whose home folder ~ would stand for." if unknown else ""


def shortened(text: str) -> str:
    """A value on one line, cut where it is long."""
    return (text if len(text) < 60 else text[:57] + "...").replace("\n", "\\n")


def _check_paths(name: str, data: DatasetSettings, taken: list[Path]) -> list[Problem]:
    """What is wrong with the files that `dataset.path` or `dataset.eval_path` names. No hint names those that are `taken`."""
    key, value = f"dataset.{name}", getattr(data, name)
    if value == "":
        return []  # refused as blank
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        mended = [f"./{text}" if isinstance(text, int | float) and not isinstance(text, bool) else text for text in texts]
        good = mended and all(isinstance(text, str) and text for text in mended)
        fix = typed(key, mended if isinstance(value, list) else mended[0]) if good else f"{key}=my_data.jsonl   for example"
        return [Problem(f"{key}={shortened(str(value))}", "It has to be a file, a folder, a glob, or a list of them.", fix)]

    def instead(old: str, new: str | list[str]) -> str:
        if not isinstance(value, list):
            return typed(key, new)
        news = new if isinstance(new, list) else [new]
        return typed(key, [one for text in texts for one in (news if text == old else [text])])

    problems = []
    for text in texts:
        what = f"{key}={shortened(text)}"
        if lost := why_lost(text):
            problems.append(Problem(what, lost, f"{key}=my_data.jsonl   for example"))
            continue
        try:
            files, _ = list_files(text)
        except OSError as error:
            problems.append(Problem(what, f"The system cannot list it: {error.strerror}.", f"chmod u+rx {shlex.quote(text)}"))
            continue
        alone = name == "path" and not isinstance(value, list) and not data.eval_path and not data.eval_split
        replaced = functools.partial(instead, text)
        if files:
            found = _check_choice(what, text, files, replaced, alone)
        else:
            found = _find_none(what, expanded(text), replaced, taken)
        problems += [found] if found else _check_files(what, files)
    return problems


def _check_choice(
    what: str, text: str, files: list[Path], instead: Callable[[str | list[str]], str], alone: bool
) -> Problem | None:
    """A path that names files of several kinds, or a folder with the files of several splits.

    `instead` gives the override with another path in place of this one; `alone` says that nothing else names rows.
    """
    kinds = Counter(kind_of(file) for file in files)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        names = []
        for kind in dict(kinds.most_common()):
            group = [file for file in files if kind_of(file) == kind]
            below = f"{text}/*{kind}"  # files in several folders, as ** finds them
            one = naming(group)
            names.append(below if isinstance(one, list) and list_files(below)[0] == group else one)
        fix = "\n".join(instead(name) for name in names if isinstance(name, str) or len(name) < 10)
        fix = fix or "put the files of one kind into a folder of their own"
        return Problem(what, f"Files of one kind are read together, and these are several: {counts}.", fix)
    train, held_out = by_split(files) if expanded(text).is_dir() else ([], [])
    if train and held_out:
        why = f"It holds files of several splits, such as {train[0].name} and {held_out[0].name}; all would be trained on."
        fix = instead(naming(train))
        fix += f" {typed('dataset.eval_path', naming(held_out))}" if alone else ""
        every = naming(files)
        return Problem(what, why, fix + (f"\n{instead(every)}   reads all of them" if isinstance(every, str) else ""))
    return None


def _find_none(what: str, path: Path, instead: Callable[[str | list[str]], str], taken: list[Path]) -> Problem:
    """The problem of a path that names no file that is read, with the files that may have been meant; these are not `taken`."""
    if path.is_dir():
        inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
        found = [folder for folder in inside if kind_of(folder) or list_files(str(folder))[0]]
        fix = f"put files there whose names end in {', '.join(KINDS)}"
        if found:
            deeper = [file for folder in found for file in ([folder] if kind_of(folder) else list_files(str(folder))[0])]
            kind = Counter(map(kind_of, deeper)).most_common(1)[0][0]
            pattern = str(path / "*") if kind == SAVED else str(path / "*" / f"*{kind}")
            fix = instead(str(found[0]) if len(found) == 1 else pattern)
        return Problem(what, f"The folder itself holds no {', '.join(KINDS)} file.", fix)
    folder = path.parent if path.parent.is_dir() else Path(".")
    near, others = list_files(str(folder))
    near = [file for file in near if file not in taken]
    if glob.has_magic(str(path)):
        why, kind = "No file of a kind that is read matches.", Counter(map(kind_of, near)).most_common(1)
        close = [file for file in near if kind_of(file) == kind[0][0]] if path.parent.is_dir() else []
    else:
        why = "There is no such file."
        near += [other for other in others if other.is_dir() and list_files(str(other))[0]]
        names = difflib.get_close_matches(path.name, [file.name for file in near if file.name != path.name], 1)
        # One shard of several is never meant alone.
        close = [file for file in near if names and re.sub(r"\d+", "0", file.name) == re.sub(r"\d+", "0", names[0])]
    return Problem(what, why, instead(naming(close)) if close else f"looked in {folder.resolve()}")


def _check_files(what: str, files: list[Path]) -> list[Problem]:
    """What is wrong with each of these files, the first three of a kind by name."""
    total, why = len(files), f"The file's name has to end in {', '.join(KINDS)}."
    faults: list[tuple[str, str, list[Path]]] = [
        ("There is no such file, only a link to it.", "", [file for file in files if not file.exists()]),
        (why, "save it in one of these formats; jsonl is the safest", [file for file in files if not kind_of(file)]),
    ]
    files = [file for file in files if file.exists() and kind_of(file)]
    empty = [file for file in files if file.is_file() and not file.stat().st_size]
    if total > 1:  # of several files one may hold no row, where its format can say that in no byte
        empty = [file for file in empty if kind_of(file) not in (".json", ".jsonl", ".csv")]
    faults.append(("The file is empty.", "write the rows first, or name another file", empty))
    closed = [file for file in files if not os.access(file, os.R_OK)]
    streams = [file for file in files if not (file.is_file() or file.is_dir())]
    stored = "".join(f"cat {shlex.quote(str(file))} > stored{kind_of(file)}   and name that file" for file in streams[:1])
    faults.append(("It is a pipe or a device, and rows are read more than once.", stored, streams))
    faults.append(("The file cannot be read by this user.", f"chmod u+r {shlex.join(map(str, closed))}", closed))
    problems = []
    for why, fix, found in faults:
        if found and total > 1:
            names = ", ".join(file.name for file in found[:3]) + (" ..." if len(found) > 3 else "")
            why = f"{len(found)} of {total} files, {names}: {why}"
        if found:
            problems.append(Problem(what, why, fix or "remove the link, or bring the file back"))
    return problems


def _check_held_out(data: DatasetSettings, readable: bool) -> list[Problem]:
    """Where held-out rows and splits come from. `readable` says that nothing was wrong with `dataset.path`."""
    problems = []
    if data.eval_path is not None:
        problems += _check_paths("eval_path", data, find_files(data.path) if data.path and readable else [])
        if data.eval_split:
            what = f"dataset.eval_path={shortened(str(data.eval_path))} dataset.eval_split={data.eval_split}"
            fix = "dataset.eval_split=null   or   dataset.eval_path=null"
            return [*problems, Problem(what, "The held-out rows come from one place only.", fix)]
        if not problems:
            problems += _check_splits("eval_path", data)
    if data.path and readable:
        problems += _check_splits("path", data)
    if data.eval_split and not data.path and data.name in schema.DATASETS:
        return [*problems, _no_split(data, [])]
    if data.eval_split and data.eval_fraction > 0 and not any(p.what.startswith("dataset.eval_split") for p in problems):
        why = "The held-out rows come from one place only."
        fix = "dataset.eval_fraction=0   or   dataset.eval_split=null"
        problems.append(Problem(f"dataset.eval_split={data.eval_split} dataset.eval_fraction={data.eval_fraction}", why, fix))
    return problems


def _check_splits(name: str, data: DatasetSettings) -> list[Problem]:
    """Splits that are not in the files, and folders with several splits where one has to be named."""
    value = getattr(data, name)
    files, problems = find_files(value), []
    for file in files:
        try:
            splits = find_splits(file)
        except (OSError, ValueError) as error:
            fix = "save it again by save_to_disk"
            return [Problem(f"dataset.{name}={file}", f"Its dataset_dict.json cannot be read: {type(error).__name__}.", fix)]
        if splits is None and name == "path" and data.eval_split:
            return [_no_split(data, files)]
        if splits and name == "eval_path":
            fix = typed("dataset.eval_path", str(file / next((s for s in splits if s != data.split), splits[0])))
            problems.append(Problem(f"dataset.eval_path={file}", f"It has several splits: {', '.join(splits)}.", fix))
        if splits is not None and name == "path":
            for key, split in (("dataset.split", data.split), ("dataset.eval_split", data.eval_split)):
                if split and split not in splits:
                    close = difflib.get_close_matches(split, splits, 1, 0.4) or splits
                    why = f"{file} has no such split; it has: {', '.join(splits)}."
                    problems.append(Problem(f"{key}={split}", why, f"{key}={close[0]}" if close else "save it again"))
    return problems


def _no_split(data: DatasetSettings, files: list[Path]) -> Problem:
    """The problem of `dataset.eval_split` with files that have no splits, with the file that may have been meant."""
    split = str(data.eval_split)
    beside = [file for folder in {file.parent for file in files} for file in list_files(str(folder))[0]]
    named = [file for file in beside if file.name.lower().removesuffix(kind_of(file)) == split.lower()]
    fix = "dataset.eval_split=null dataset.eval_fraction=0.1   holds rows out"
    if not why_lost(split) and list_files(split)[0]:
        fix = f"dataset.eval_split=null {typed('dataset.eval_path', split)}"
    elif named:
        fix = f"dataset.eval_split=null {typed('dataset.eval_path', str(named[0]))}"
    else:
        fix += "\ndataset.eval_split=null dataset.eval_path=<file>   for held-out rows in a file of their own"
    return Problem(f"dataset.eval_split={split}", "A local file has no splits.", fix)


def warn_of_paths(data: DatasetSettings) -> list[str]:
    """What `dataset.path` and `dataset.eval_path` name that is not read, or holds no row."""
    found = []
    for key, value in (("dataset.path", data.path), ("dataset.eval_path", data.eval_path)):
        for text in [value] if isinstance(value, str) else value or []:
            files, others = list_files(text)
            total = len(files) + len(others)
            empty = [file for file in files if file.is_file() and not file.stat().st_size]
            for what, those in (("not read", others), ("empty", empty)):
                if those:
                    be = "is" if len(those) == 1 else "are"
                    names = ", ".join(file.name for file in those[:3]) + (" ..." if len(those) > 3 else "")
                    found.append(f"{key}={shortened(text)}: of {total} entries, {len(those)} {be} {what}: {names}.")
    if data.path and data.split != DatasetSettings().split and not any(map(find_splits, find_files(data.path))):
        found.append("dataset.split is ignored: dataset.path has no splits.")
    if data.eval_path and data.eval_fraction not in (0, DatasetSettings().eval_fraction):
        found.append(f"dataset.eval_fraction={data.eval_fraction:g} is ignored: dataset.eval_path names the held-out rows.")
    return found


def _check_template(data: DatasetSettings) -> list[Problem]:
    template = data.template
    shown = shortened(template)
    if not template:
        return []  # refused as blank
    if template in ("auto", "chat", "alpaca", "plain"):
        if template in ("alpaca", "plain") and data.system_prompt:
            why = "The template has no place for a system prompt, so it would be ignored."
            fix = "dataset.template=chat   or a template text with {system}"
            return [Problem(f"dataset.template={template} dataset.system_prompt=...", why, fix)]
        return []
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        return [Problem(f"dataset.template={shown}", f"The braces do not match: {error}.", "write a literal brace as {{ or }}")]
    names = [name for _, name, _, _ in parts]
    if not names:
        close = difflib.get_close_matches(template, ["auto", "chat", "alpaca", "plain"], 1)
        why = "Neither a known template (auto, chat, alpaca, plain) nor a text with {instruction} and {output} in it."
        fix = f"dataset.template={close[0] if close else 'auto'}"
        return [Problem(f"dataset.template={shown}", why, fix)]
    problems = []
    example = """'dataset.template="Q: {instruction}\\nA: {output}"'"""
    answers = [name for name in names if name in ANSWER_ROLES]
    if "" in names:
        why = "Braces need a name between them, so that it is known which column stands where."
        problems.append(
            Problem(f"dataset.template={shown}", why, f"write {{instruction}}, {{input}} and {{output}}: {example}")
        )
    elif len(answers) != 1:
        why = f"The answer has to stand in it once, as {{output}} or {{completion}}; found {len(answers)} times."
        problems.append(Problem(f"dataset.template={shown}", why, example))
    elif parts[0][:2] == ("", answers[0]):
        why = "Nothing stands before the answer, so there would be nothing to ask."
        fix = f"{example}\ndataset.shape=text dataset.columns.text=...   trains on a text as it stands"
        problems.append(Problem(f"dataset.template={shown}", why, fix))
    if any(spec or conversion for _, _, spec, conversion in parts):
        why = "Only names can stand in braces; a format or a conversion after the name would be ignored."
        problems.append(Problem(f"dataset.template={shown}", why, "write a literal brace as {{ or }}"))
    if data.system_prompt and "system" not in names:
        why = "The template has no {system}, so the system prompt would be ignored."
        fix = "put {system} into the template   or   dataset.system_prompt=null"
        problems.append(Problem(f"dataset.template={shown} dataset.system_prompt=...", why, fix))
    return problems
