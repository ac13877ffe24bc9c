"""Rows to roles: which shape the data has, which column plays which role, and a row as fields or as turns."""

import difflib
import functools
import itertools
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft.config.keys import typed
from sft.config.schema import ColumnSettings, DatasetSettings, Shape
from sft.data.cells import (
    REASONING,
    RowFault,
    Turn,
    answer_calls,
    as_text,
    cell_text,
    holds_something,
    holds_turns,
    parsed_or_none,
    read_history,
    read_tools,
    read_turns,
)
from sft.errors import Problem, Refusal, refuse

# Names that columns of a role have in the wild, for the likeliest match.
SYNONYMS = {
    "instruction": ["question", "query", "prompt", "input", "user", "ask", "problem", "问题", "指令"],
    "output": ["answer", "response", "completion", "reply", "assistant", "target", "chosen", "answers", "回答", "答案", "输出"],
    "system": ["system_prompt", "system_message"],
    "prompt": ["instruction", "question", "query", "input", "问题"],
    "completion": ["output", "answer", "response", "reply", "回答"],
    "conversations": ["conversation", "messages", "dialog", "dialogue", "chat"],
    "messages": ["message", "conversations", "conversation", "chat", "dialog"],
    "text": ["content", "document", "body", "文本"],
}

# Columns that say of a whole row, or of each of its answers or turns in a list, whether it is trained on.
WEIGHT_COLUMNS = {"weight", "weights", "loss_mask", "trainable"}

# Columns that carry meaning, under the names that public data sets give them, by the role that takes it.
MEANINGS = {
    "system": ("system", "system_prompt", "system_message"),
    "input": ("input", "context"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "reasoning": (*REASONING, "chain_of_thought", "cot", "complex_cot"),
}

# Columns of what is no text.
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")


@dataclass(frozen=True)
class Layout:
    """What is known of the rows of one shape."""

    needed: tuple[tuple[str, ...], ...]
    """Roles that need a column, the question's first; of several in one place the first that has one."""
    answer: str
    """The role of the column with the answers."""
    optional: tuple[str, ...] = ()
    """Roles that a row may have besides."""
    turns: bool = False
    """Whether the answers' column holds a conversation."""
    plain: str = ""
    """`dataset.template=plain` as a template text; blank where it is not one."""


SHAPES = {
    Shape.messages: Layout((("messages",),), "messages", ("system", "tools"), turns=True),
    Shape.conversations: Layout((("conversations",),), "conversations", ("system", "tools"), turns=True),
    Shape.instruction: Layout((("instruction", "input"), ("output",)), "output",
                              ("input", "system", "tools", "history", "reasoning"),
                              plain="{instruction}\n\n{input}\n\n{output}"),
    Shape.prompt_completion: Layout((("prompt",), ("completion",)), "completion", ("system", "tools", "history", "reasoning"),
                                    plain="{prompt}{completion}"),
    Shape.text: Layout((("text",),), "text"),
}  # fmt: skip
"""The shapes, in the order in which `auto` tries them."""

# What a template text can always name in braces, whatever the columns are called.
FIELDS = ("instruction", "input", "output", "prompt", "completion", "system")


def find_shape(rows: Sequence[dict], data: DatasetSettings) -> Shape:
    """The shape that `dataset.shape` names, or the one that the columns of the first rows speak for."""
    if data.shape != Shape.auto:
        return data.shape
    names, columns = column_names(rows), data.columns
    for shape, layout in SHAPES.items():
        if all(any(getattr(columns, role) in names for role in roles) for roles in layout.needed):
            return shape
    if columns.output in names or columns.instruction in names:
        return Shape.instruction  # check_columns says what is missing
    own = "dataset.format=rows.py:to_messages   a function of your own for each row"
    fix = guess_shape(rows, names, data) or f"dataset.shape=text dataset.columns.text=<column>\n{own}"
    raise refuse("dataset.shape=auto", f"The columns {', '.join(sorted(names))} fit no known shape.", fix)


def guess_shape(rows: Sequence[dict], names: set[str], data: DatasetSettings) -> str:
    """The overrides that read these rows, tried on the first of them; blank if none do."""
    guesses = [(Shape.messages, {"messages": name}) for name in sorted(names)]
    question, answer = likeliest("instruction", "instruction", names), likeliest("output", "output", names)
    if question and answer and question != answer:
        freed = {"input": None} if question == data.columns.input else {}
        guesses.append((Shape.instruction, {"instruction": question, **freed, "output": answer}))
    if text := likeliest("text", "text", names):
        guesses.append((Shape.text, {"text": text}))
    for shape, roles in guesses:
        for role in SHAPES[shape].optional:
            known = [name for name in sorted(names - {*roles.values()}) if name.lower() in MEANINGS[role]]
            if known and role not in roles and getattr(data.columns, role) not in names:
                roles = {**roles, role: known[0]}
        tried = replace(data, shape=shape, columns=replace(data.columns, **roles))
        if all(_reads(rows[i], tried, shape) for i in range(min(3, len(rows)))):
            words = [_column(role, name) for role, name in sorted(roles.items(), key=_in_order)]
            return " ".join(words if shape != Shape.text else ["dataset.shape=text", *words])
    return ""


def _in_order(role: tuple[str, Any]) -> int:
    """Where a role stands in a row: what is read first comes first."""
    order = ("system", "tools", "history", "messages", "instruction", "input", "reasoning", "output", "text")
    return order.index(role[0])


def _reads(row: dict, data: DatasetSettings, shape: Shape) -> bool:
    """Whether a row can be read with these columns."""
    try:
        if shape == Shape.text:
            return bool(cell_text(row.get(data.columns.text), "text").strip())
        return any(turn.role == "assistant" for turn in row_to_turns(row, data, shape))
    except (ValueError, TypeError, AttributeError, KeyError):
        return False


def check_columns(rows: Sequence[dict], data: DatasetSettings, shape: Shape, source: str, answered: bool = True) -> None:
    """Refuse, all at once, roles whose column is not in the data, with the likeliest match. The answer's needs none where no
    row is `answered`.
    """
    names, columns = column_names(rows), data.columns
    problems = []
    for role in (_role_of(roles, columns) for roles in SHAPES[shape].needed):
        if role == SHAPES[shape].answer and not answered:
            continue
        column = getattr(columns, role)
        if column is None:
            match = likeliest(role, role, {name for name in names if _suits(rows, name, SHAPES[shape].turns)})
            why = f"The {shape.value} shape needs a column for {role}. There are: {', '.join(sorted(names))}."
            fix = _mapping(role, match, data) if match else f"dataset.columns.{role}=<column>"
            problems.append(Problem(f"dataset.columns.{role}=null", why, fix))
        elif column not in names:
            match = likeliest(role, column, {name for name in names if _suits(rows, name, SHAPES[shape].turns)})
            why = f"{source} has no column {column!r}. It has: {', '.join(sorted(names))}."
            fix = _mapping(role, match, data) if match else f"dataset.columns.{role}=<column>   or another dataset.shape"
            problems.append(Problem(f"dataset.columns.{role}={column}", why, fix))
    for group, column, pattern in [(g, *pair) for g in ("keep", "drop") for pair in getattr(data, g).items()]:
        if column not in names:
            match = likeliest(column, column, names)
            fix = f"dataset.{group}={{}}   in its place, to filter nothing"
            fix = f"{typed(f'dataset.{group}.{match}', pattern)}\n{fix}" if re.fullmatch(r"\w+", match or "", re.A) else fix
            why = f"{source} has no column {column!r}. It has: {', '.join(sorted(names))}."
            problems.append(Problem(f"dataset.{group}.{column}={pattern}", why, fix))
    for column in data.ignore_columns:
        if column not in names:
            match = likeliest(column, column, names - {*data.ignore_columns})
            others = [name for name in data.ignore_columns if name != column]
            fix = typed("dataset.ignore_columns", [*others, match] if match else others)
            why = f"{source} has no column {column!r}. It has: {', '.join(sorted(names))}."
            problems.append(Problem(f"dataset.ignore_columns=[{column}]", why, fix))
    allowed = {*FIELDS} if SHAPES[shape].turns else {*FIELDS, *names}
    for name in names_in(data.template):
        if name not in allowed:  # it would be filled with nothing
            match = likeliest(name, name, allowed)
            fix = typed("dataset.template", data.template.replace(f"{{{name}", f"{{{match}")) if match else ""
            why = f"The template can name {', '.join(sorted(allowed))}."
            problems.append(Problem(f"dataset.template=...{{{name}}}...", why, fix))
    if problems:
        raise Refusal(problems)


def _suits(rows: Sequence[dict], column: str, turns: bool) -> bool:
    """Whether the first row has turns, or else text, in this column: a hint names no other."""
    value = rows[0].get(column) if len(rows) else None
    if turns:
        return holds_turns(parsed_or_none(value))
    return not isinstance(value, list | dict)


def question_row(question: str, columns: ColumnSettings, shape: Shape) -> dict[str, Any]:
    """A row of this shape with this question and a stand-in for its answer."""
    layout = SHAPES[shape]
    answer = getattr(columns, layout.answer)
    if layout.turns:
        return {answer: [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]}
    return {getattr(columns, _role_of(layout.needed[0], columns)): question, answer: "x"}


def _role_of(roles: tuple[str, ...], columns: ColumnSettings) -> str:
    """Of roles that can stand for each other the first that has a column."""
    return next((role for role in roles if getattr(columns, role)), roles[-1])


def likeliest(role: str, column: str, names: set[str]) -> str | None:
    """The column of `names` that was probably meant: by spelling first, then by what such columns are usually called."""
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(column.lower(), lower, 1, 0.75)
    close += [word for word in SYNONYMS.get(role, []) if word in lower]
    return lower[close[0]] if close else None


def row_to_fields(row: dict, data: DatasetSettings, shape: Shape, template: str) -> dict[str, str]:
    """Values for a template text, by role; columns without a role that the text names are reached by their own name."""
    if SHAPES[shape].turns or _prompt_is_turns(row, data, shape):
        return _turns_to_fields(row_to_turns(row, data, shape))
    values = {name: as_text(row.get(name)) for name in names_in(template)}
    for role in FIELDS:
        column = getattr(data.columns, role)
        values[role] = cell_text(row.get(column), column) if column else ""
    values["system"] = values["system"] or data.system_prompt or ""
    if shape == Shape.prompt_completion:
        values["instruction"] = values["instruction"] or values["prompt"]
        values["output"] = values["output"] or values["completion"]
    elif shape == Shape.instruction:
        values["completion"] = values["output"]
        values["prompt"] = values["prompt"] or "\n\n".join(v for v in (values["instruction"], values["input"]) if v)
    return values


def row_to_turns(row: dict, data: DatasetSettings, shape: Shape) -> list[Turn]:
    """A row as turns for a chat template. Raises ValueError where something in it could not be trained on as it stands."""
    columns = data.columns
    if SHAPES[shape].turns:
        column = getattr(columns, SHAPES[shape].answer)
        turns = read_turns(row.get(column), column)
    elif _prompt_is_turns(row, data, shape):
        turns = read_turns(row[columns.prompt], columns.prompt)
        answer = row.get(columns.completion)
        answer = [answer] if holds_turns([answer]) else answer  # a turn by itself, as LLaMA-Factory's pairs have it
        if isinstance(answer, list):
            turns += read_turns(answer, columns.completion)
        else:
            turns.append(Turn("assistant", cell_text(answer, columns.completion)))
    else:
        column = getattr(columns, SHAPES[shape].answer)
        calls = answer_calls(row.get(column), column) if read_tools(row, columns) else []
        values = row_to_fields(row | {column: ""} if calls else row, data, shape, "")
        question = values["prompt"] if shape == Shape.prompt_completion else ""
        question = question or "\n\n".join(v for v in (values["instruction"], values["input"]) if v)
        answer = values["completion"] if shape == Shape.prompt_completion else values["output"]
        thought = cell_text(row.get(columns.reasoning), columns.reasoning) if columns.reasoning else ""
        extra = {"tool_calls": calls} if calls else {}
        turns = [*read_history(row, columns), Turn("user", question), Turn("assistant", answer, thought, extra=extra)]
    system = cell_text(row.get(columns.system), columns.system) if columns.system else ""
    system = system.removeprefix("SYSTEM: ").strip() if system.startswith("SYSTEM: ") else system  # beside a transcript
    if system.strip() and turns[:1] and turns[0].role == "system" and turns[0].content.strip() != system.strip():
        why = f"column {columns.system!r} and the first turn hold two system prompts"
        raise RowFault(why, f"dataset.columns.system=null {ignoring(columns.system, data)}   takes that of the turns")
    system = system or data.system_prompt or ""
    if system and (not turns or turns[0].role != "system"):
        turns.insert(0, Turn("system", system))
    _weigh(turns, row, data)
    return turns


def row_is_read(row: dict, data: DatasetSettings) -> bool:
    """Whether a weight of 0 in a column says that nothing of the row is trained on."""
    return any(weight == 0 for _, weight in _row_weights(row, data) if not isinstance(weight, list))


def _row_weights(row: dict, data: DatasetSettings) -> list[tuple[str, Any]]:
    """(column, weight) of the columns that weigh a row: 0, 1, or a list of these. Raises ValueError for another weight."""
    found = []
    for name in WEIGHT_COLUMNS & row.keys():
        value = row[name]
        if name in data.ignore_columns or not holds_something(value):
            continue
        value = value if parsed_or_none(value) is None else parsed_or_none(value)  # in CSV files all is text
        if any(one not in (0, 1) for one in (value if isinstance(value, list) else [value])):
            why = f"column {name!r} holds {str(value)[:20]}; a weight can be 0 or 1, and other weights are not supported"
            raise RowFault(why, f"{ignoring(name, data)}   leaves them out")
        found.append((name, value))
    return found


def _weigh(turns: list[Turn], row: dict, data: DatasetSettings) -> None:
    """Mark answers as read that a list of weights, one for each turn or for each answer, gives 0."""
    for name, weights in _row_weights(row, data):
        answers = [turn for turn in turns if turn.role == "assistant" and turn.trained_on]
        spoken = [turn for turn in turns if turn.role != "system"]
        if not isinstance(weights, list):
            continue
        weighed = next((some for some in (turns, spoken, answers) if len(some) == len(weights)), None)
        if weighed is None:
            why = f"column {name!r} holds {len(weights)} weights for {len(turns)} turns, {len(answers)} of them answers"
            raise RowFault(why, f"{ignoring(name, data)}   leaves them out")
        for turn, weight in zip(weighed, weights, strict=True):
            turn.trained_on = turn.trained_on and weight == 1


def sort_columns(names: set[str], data: DatasetSettings, shape: Shape, template: str) -> tuple[list[str], dict[str, str]]:
    """(columns that are not used, columns that carry meaning and have no place, each with the overrides that help)."""
    layout, columns = SHAPES[shape], data.columns
    roles = [_role_of(some, columns) for some in layout.needed] + list(layout.optional)
    if template not in ("chat", "plain"):
        named = names_in(template)
        roles = [role for role in FIELDS if role in named] if not layout.turns else [*roles, "system"]
        if "prompt" in named and shape == Shape.instruction:
            roles += ["instruction", "input"]
    for role in roles:
        if (column := getattr(columns, role)) and column in data.ignore_columns:
            why = f"The column is used: it plays the role {role}."
            fix = typed("dataset.ignore_columns", [name for name in data.ignore_columns if name != column]) + "   uses it"
            fix += f"\ndataset.columns.{role}=null   leaves it out" if role in layout.optional else ""
            raise refuse(f"dataset.ignore_columns=[{column}]", why, fix)
    used = {getattr(columns, role) for role in roles} | {*data.keep, *data.drop, *WEIGHT_COLUMNS}
    if template not in ("chat", "plain"):
        used |= {*names_in(template), columns.history, columns.tools}  # which a template text refuses by itself
    unused = sorted(name for name in names if name not in used and name not in data.ignore_columns)
    meant = {}
    for name in unused:
        role = next((role for role, known in MEANINGS.items() if getattr(columns, role) == name or name.lower() in known), None)
        if name.lower() in NOT_TEXT:
            meant[name] = f"{ignoring(name, data)}   leaves it out: only text is trained on"
        elif role and shape != Shape.text:
            meant[name] = _way_in(role, name, names, data, shape, template)
    return [name for name in unused if name not in meant], meant


def _way_in(role: str, column: str, names: set[str], data: DatasetSettings, shape: Shape, template: str) -> str:
    """The overrides by which a column that carries meaning is used, and the one that leaves it out."""
    out = f"{ignoring(column, data)}   leaves it out"
    mapped, chat = _column(role, column), "" if template == "chat" or role in names_in(template) else "dataset.template=chat "
    if getattr(data.columns, role) == column or (role in SHAPES[shape].optional and getattr(data.columns, role) not in names):
        return f"{chat}{mapped}\n{out}"
    if shape == Shape.prompt_completion and role == "input":
        columns = {"instruction": data.columns.prompt, "input": column, "output": data.columns.completion}
        return f"{chat}dataset.shape=instruction {' '.join(itertools.starmap(_column, columns.items()))}\n{out}"
    return out


def ignoring(column: str, data: DatasetSettings) -> str:
    """The override that leaves a column out, beside those that are left out already."""
    return typed("dataset.ignore_columns", [*data.ignore_columns, column])


def _column(role: str, name: str | None) -> str:
    """The override that gives a role this column, or none."""
    return typed(f"dataset.columns.{role}", name) if name else f"dataset.columns.{role}=null"


def _prompt_is_turns(row: dict, data: DatasetSettings, shape: Shape) -> bool:
    """Whether a prompt/completion row has turns for a prompt, as TRL's conversational form has."""
    return shape == Shape.prompt_completion and isinstance(row.get(data.columns.prompt), list)


def _turns_to_fields(turns: list[Turn]) -> dict[str, str]:
    spoken = [turn for turn in turns if turn.role != "system"]
    if [turn.role for turn in spoken] != ["user", "assistant"]:
        roles = ", ".join(turn.role for turn in spoken)
        raise RowFault(f"a template text takes one question and one answer, and this row has {roles}", "dataset.template=chat")
    if spoken[1].reasoning or not spoken[1].trained_on or spoken[1].extra.get("tool_calls"):
        what = "reasoning in a key of its own" if spoken[1].reasoning else "the weight 0"
        what = "a call of a tool" if spoken[1].extra.get("tool_calls") else what
        raise RowFault(f"a template text has no place for an answer with {what}", "dataset.template=chat")
    question, answer = spoken[0].content, spoken[1].content
    system = next((turn.content for turn in turns if turn.role == "system"), "")
    return {"instruction": question, "prompt": question, "input": "", "output": answer, "completion": answer, "system": system}


@functools.lru_cache(maxsize=8)
def names_in(template: str) -> tuple[str, ...]:
    """What a template text names in braces."""
    return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


def column_names(rows: Sequence[dict]) -> set[str]:
    """The columns that one of the rows has."""
    if hasattr(rows, "column_names"):
        return set(rows.column_names)
    names: set[str] = set()
    for row in rows:
        names |= row.keys()
    return names


def _mapping(role: str, column: str, data: DatasetSettings) -> str:
    """The override that maps a role, and the one that keeps a question in the input column from being there twice."""
    freed = " dataset.columns.input=null" if role == "instruction" and column == data.columns.input else ""
    return f"{_column(role, column)}{freed}"
