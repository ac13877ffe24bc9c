"""Rules for the data's settings: where the rows come from, which columns they have, and how they become a text.

Imports neither torch nor transformers; the rows themselves are not read.
"""

import difflib
import os
import re
import shlex
import string
import warnings
from pathlib import Path

from sft.config import schema
from sft.config.schema import DatasetSettings
from sft.errors import Problem

TEXT_FORMATS = (".json", ".jsonl", ".csv", ".parquet")

ANSWER_ROLES = ("output", "completion")


def check_dataset(data: DatasetSettings) -> list[Problem]:
    """What is wrong with where the rows come from, their columns, their template and their filters."""
    problems = []
    if data.path:
        problems += _check_path(data.path)
    elif data.path is None and not data.name:
        why = "Neither a local file nor a hub data set is named."
        problems.append(Problem("dataset.path=null dataset.name=null", why, "dataset.path=my_data.jsonl"))
    if data.eval_split and (data.path or data.name in schema.DATASETS):
        fix = "dataset.eval_split=null dataset.eval_fraction=0.1"
        problems.append(Problem(f"dataset.eval_split={data.eval_split}", "A local file has no splits.", fix))
    if data.eval_split and data.eval_fraction > 0:
        why = "The held-out rows come from one place only."
        fix = "dataset.eval_fraction=0   or   dataset.eval_split=null"
        problems.append(Problem(f"dataset.eval_split={data.eval_split} dataset.eval_fraction={data.eval_fraction}", why, fix))
    problems += _check_columns(data)
    problems += _check_template(data)
    for group in ("keep", "drop"):
        for column, pattern in getattr(data, group).items():
            try:
                with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of brackets that may mean more one day
                    re.compile(pattern)
            except re.error as error:
                quoted = re.escape(pattern).replace('"', '\\"')
                fix = shlex.quote(f'dataset.{group}.{column}="{quoted}"') + "   for these very characters"
                problems.append(Problem(f"dataset.{group}.{column}={pattern}", f"Not a regular expression: {error}.", fix))
    return problems


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
    try:
        Path(path_text).expanduser().exists()
    except RuntimeError:
        return "There is no such user, whose home folder ~ would stand for."
    except OSError as error:
        return f"The system cannot look it up: {error.strerror}."
    return ""


def shortened(text: str) -> str:
    """A value on one line, cut where it is long."""
    return (text if len(text) < 60 else text[:57] + "...").replace("\n", "\\n")


def _check_path(path_text: str) -> list[Problem]:
    if lost := why_lost(path_text):
        return [Problem(f"dataset.path={shortened(path_text)}", lost, "dataset.path=my_data.jsonl   for example")]
    path = Path(path_text).expanduser()
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path(".")
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in TEXT_FORMATS]
        close = [name for name in difflib.get_close_matches(path.name, names, 2) if name != path.name]
        fix = f"dataset.path={folder / close[0]}" if close else f"looked in {folder.resolve()}"
        return [Problem(f"dataset.path={path_text}", "There is no such file.", fix)]
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in TEXT_FORMATS)
        fix = f"dataset.path={path / inside[0]}" if inside else f"it holds no {', '.join(TEXT_FORMATS)} file"
        return [Problem(f"dataset.path={path_text}", "This is a folder; a single file is read.", fix)]
    if path.suffix.lower() not in TEXT_FORMATS:
        why = f"The file's name has to end in {', '.join(TEXT_FORMATS)}."
        return [Problem(f"dataset.path={path_text}", why, "save it in one of these formats; jsonl is the safest")]
    if path.stat().st_size == 0:
        return [Problem(f"dataset.path={path_text}", "The file is empty.", "write the rows first, or name another file")]
    if not os.access(path, os.R_OK):
        return [Problem(f"dataset.path={path_text}", "The file cannot be read by this user.", f"chmod u+r {path}")]
    return []


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
