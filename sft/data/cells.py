"""What a cell of a row holds: text, the turns of a conversation, calls and definitions of tools."""

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

from sft.config.keys import typed
from sft.config.schema import ColumnSettings
from sft.data.transcripts import read_transcript

# Speakers of ShareGPT and its relatives, in the names that chat templates know.
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
            "function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool"}  # fmt: skip

ROLES = ("system", "user", "assistant", "tool", "developer")

# Keys of a turn, as public data sets write them: what an assistant thought, and whether its answer is trained on (OpenAI and
# Mistral: weight; axolotl and open-instruct: train, training; ms-swift: loss; others: loss_mask, trainable).
REASONING = ("reasoning_content", "reasoning", "thinking")

WEIGHTS = ("weight", "train", "training", "loss", "loss_mask", "trainable")

# Keys of a turn that reach the chat template as they stand.
PASSED = ("name", "tool_call_id")

READ_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *PASSED, *REASONING, *WEIGHTS}


@dataclass
class Turn:
    """One turn of a conversation."""

    role: str
    content: str
    reasoning: str = ""
    """What an assistant thought before it answered, where the data has it in a key of its own."""
    trained_on: bool = True
    """Whether an assistant's answer is trained on, as its weight says; else it is only read."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is given of it: `tool_calls`, `name`, `tool_call_id`."""
    is_null: bool = False
    """Whether the content is null, as it is beside calls: some templates tell that from a blank one."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the turn that hold something and are not used."""


class RowFault(ValueError):
    """A row that cannot be read, with the override that helps."""

    def __init__(self, why: str, fix: str):
        super().__init__(why)
        self.fix = fix


def cell_text(value: Any, column: str) -> str:
    """A question's or an answer's cell. Raises RowFault for a list or an object: as JSON it would be trained on by accident."""
    if type(value) is str:
        return value
    if isinstance(value, list | dict):
        turns = f"dataset.shape=messages {typed('dataset.columns.messages', column)}" if holds_turns(value) else ""
        what = "a list" if isinstance(value, list) else "an object"
        fix = turns or "write the cells as text, for example as JSON text"
        raise RowFault(f"column {column!r} holds {what}, not text", fix)
    if isinstance(value, float) and math.isinf(value):  # as 1e999 in a JSON file
        raise ValueError(f"column {column!r} holds an infinite number")
    return as_text(value)


def as_text(value: Any) -> str:
    """A cell as text: null and NaN are blank, bytes are UTF-8, a list or object is JSON.

    Raises ValueError for bytes that are no UTF-8 text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for an empty cell
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # parquet files of Spark and Hive do not say that their bytes are text
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("a cell holds bytes that are no UTF-8 text") from None
    try:
        return json.dumps(value, ensure_ascii=False, default=str)  # parquet columns can hold dates
    except RecursionError:
        raise ValueError("a value is nested too deeply to be written as text") from None


def holds_something(value: Any) -> bool:
    """Whether a cell is not blank: null, NaN, and empty texts and lists are."""
    return value == value and value not in (None, "", [], {})


def holds_turns(value: Any) -> bool:
    """Whether a cell is a list of turns, in OpenAI's form or in ShareGPT's."""
    forms = ({"role", "content"}, {"from", "value"})
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(t, dict) and any(f <= t.keys() for f in forms) for t in value)
    )


def read_raw_turns(value: Any) -> list[dict]:
    """The turns of a cell that `row_to_turns` reads, as they stand: of a transcript, of JSON text, or of a list."""
    return (read_transcript(value) or json.loads(value)) if isinstance(value, str) else value


def read_turns(value: Any, column: str) -> list[Turn]:
    """Turns of a cell. Raises ValueError where something in it could not be trained on as it stands."""
    if isinstance(value, str) and (spoken := read_transcript(value)):
        value = spoken
    if isinstance(value, str):  # CSV files carry turns as JSON text
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"column {column!r} has to hold a list of turns; as JSON it has the fault: {error.msg}") from None
        except RecursionError:
            raise ValueError(f"column {column!r} is nested too deeply to be read") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} has to hold a list of turns; this is {str(value)[:40]!r}")
    if all(isinstance(pair, dict) and pair.keys() >= {"input", "output"} and "role" not in pair for pair in value):
        return [t for p in value for t in (Turn("user", cell_text(p["input"], column)),
                                           Turn("assistant", cell_text(p["output"], column)))]  # fmt: skip
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} in column {column!r} is {str(turn)[:40]!r}, not an object with role and content")
        speaker = str(turn.get("role") or turn.get("from") or "").lower()
        role = SPEAKERS.get(speaker, speaker)
        if role not in ROLES:
            raise ValueError(f"unknown speaker {speaker!r} in column {column!r}; known are {', '.join([*ROLES, *SPEAKERS])}")
        content, calls = turn.get("content", turn.get("value")), _read_calls(turn, speaker, number, column)
        content = "" if speaker == "function_call" else _join_parts(content, role, number, column)
        extra = {key: turn[key] for key in PASSED if turn.get(key)} | ({"tool_calls": calls} if calls else {})
        if calls and role != "assistant":
            raise ValueError(f"turn {number} in column {column!r} calls a tool as {role}; only an assistant can")
        unused = tuple(key for key, value in turn.items() if key not in READ_KEYS and value not in (None, "", [], {}))
        if role != "assistant":  # whose words are never trained on
            unused += tuple(key for key in WEIGHTS if turn.get(key))
            turns.append(Turn(role, content, extra=extra, unused=unused))
            continue
        reasoning = next((text for key in REASONING if (text := as_text(turn.get(key))).strip()), "")
        is_null = (bool(calls) and turn.get("content", turn.get("value")) is None) or speaker == "function_call"
        turns.append(Turn(role, content, reasoning, _is_trained_on(turn, number, column), extra, is_null, unused))
    return turns


def _join_parts(content: Any, role: str, number: int, column: str) -> str:
    """A turn's content as text, also where it is a list of parts such as `{"type": "text", "text": "..."}`.

    What a tool gives may be of any form: it is only read, and JSON says it.
    """
    if not (isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content)):
        return as_text(content) if role == "tool" else cell_text(content, column)
    other = next((part["type"] for part in content if part["type"] != "text"), None)
    if other:
        raise ValueError(f"turn {number} in column {column!r} holds a part of type {other!r}; only text can be trained on")
    return "".join(as_text(part.get("text")) for part in content)


def _is_trained_on(turn: dict, number: int, column: str) -> bool:
    """Whether the weights of an assistant's turn let it be trained on. Raises ValueError for one that is neither 0 nor 1."""
    for key in WEIGHTS:
        value = turn.get(key)
        if value is None or value != value:  # NaN, as pandas has it where there is none
            continue
        if value not in (0, 1):
            raise ValueError(f"turn {number} in column {column!r} has {key}={str(value)[:20]}; a weight can be 0 or 1")
        if value == 0:
            return False
    return True


def _read_calls(turn: dict, speaker: str, number: int, column: str) -> list[dict]:
    """A turn's calls of tools in OpenAI's form, with arguments as an object: templates write that as JSON, and JSON text as a
    quoted text. They stand in `tool_calls`, in the older `function_call`, or as a ShareGPT turn of their own.
    """
    what = f"turn {number} in column {column!r}"
    found = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if speaker == "function_call":
        found = turn.get("content") if "content" in turn else turn.get("value")
    found = _parsed(found, f"the call of {what}")
    calls = []
    for call in found if isinstance(found, list) else [found]:
        function = _parsed(call.get("function", call), f"the call of {what}") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{what} calls a tool in a form that is not known; it takes a name and arguments")
        arguments = _parsed(function.get("arguments", function.get("parameters")) or {}, f"the arguments of {what}")
        named = {key: call[key] for key in ("id",) if call.get(key)}
        calls.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def answer_calls(value: Any, column: str) -> list[dict]:
    """The calls of an answer that is nothing but a list of them, as xLAM's rows have it; none if it is something else."""
    calls = parsed_or_none(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(calls, list) and calls and all(isinstance(c, dict) and {"name", "arguments"} <= c.keys() for c in calls):
        return _read_calls({"tool_calls": calls}, "assistant", 1, column)
    return []


def read_history(row: dict, columns: ColumnSettings) -> list[Turn]:
    """The earlier turns of an Alpaca row: pairs of a question and an answer, or turns. They are read, not trained on."""
    name = columns.history
    pairs = _from_json(row.get(name), name, "history") if name else None
    if not pairs:
        return []
    if holds_turns(pairs):
        turns = read_turns(pairs, name)
        return [replace(turn, trained_on=False) for turn in turns]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowFault(f"column {name!r} has to hold pairs of a question and an answer", _without("history", name))
    texts = [[cell_text(cell, name) for cell in pair] for pair in pairs]
    return [
        turn for question, answer in texts for turn in (Turn("user", question), Turn("assistant", answer, trained_on=False))
    ]


def read_tools(row: dict, columns: ColumnSettings) -> list[dict]:
    """The functions that a row defines, as a list, each an object or JSON text of one, or as JSON text; none without them."""
    name = columns.tools
    tools = _from_json(row.get(name), name, "tools") if name else None
    if not tools:
        return []
    tools = [parsed_or_none(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault(f"column {name!r} has to hold a list of functions, each an object", _without("tools", name))
    return tools


def _parsed(value: Any, what: str) -> Any:
    """A value that may be written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is text that is no JSON: {error}") from None


def parsed_or_none(value: Any) -> Any:
    try:
        return _parsed(value, "")
    except ValueError:
        return None


def _from_json(value: Any, column: str, role: str) -> Any:
    """A cell that holds a list, also where it is written as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value if isinstance(value, list | dict) else None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        why = f"column {column!r} has to hold a list; as JSON it has a fault: {error}"
        raise RowFault(why, _without(role, column)) from None


def _without(role: str, column: str) -> str:
    """The hint that trains without the column of a role."""
    return f"dataset.columns.{role}=null {typed('dataset.ignore_columns', [column])}   leaves it out"
