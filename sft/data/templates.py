"""A row to text to tokens: the template, where the answers stand in it, BOS once and an end mark last."""

import functools
import json
import re
import string
from dataclasses import dataclass, field

from sft.config.schema import DatasetSettings, Shape
from sft.data.columns import REASONING, SHAPES, Turn, cell_text, names_in, read_history, read_tools, row_to_fields, row_to_turns
from sft.errors import first_line, refuse

MOST_TEMPLATE = 1_000_000
"""Characters that a chat template may write besides contents: a batch of rows is held in memory."""

# The prompt of the Unsloth notebook, which is Stanford Alpaca's with an input (github.com/tatsu-lab/stanford_alpaca).
ALPACA = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""


@dataclass
class Rendered:
    """A row as text, and which parts of it are the answer."""

    text: str
    spans: list[tuple[int, int]]
    """Character ranges of the answers, each with its end mark."""
    question: str
    """The question, for people to read."""
    reference: str
    """The answer in the data, for people to read."""
    notes: list[str] = field(default_factory=list)
    """What was left out, once each time: `reasoning`, `weight`, `tools`, or `key NAME` for an unused key of a turn."""


def choose_template(data: DatasetSettings, shape: Shape, tokenizer) -> str:
    """`chat`, `plain`, or a template text: what `dataset.template` comes to for this data and tokenizer.

    A `\\n` typed on the command line, which shells and Hydra leave as two characters, is a line break in a template text.
    Raises Refusal if the template does not go with the rows or the tokenizer.
    """
    has_chat = bool(tokenizer.chat_template)
    multi_turn = SHAPES[shape].turns
    template = data.template
    if shape == Shape.text:
        if template not in ("auto", "plain"):
            raise refuse(
                "dataset.template=" + template[:40], "Rows of plain text are used as they stand.", "dataset.template=plain"
            )
        return "plain"
    if template == "auto":
        template = "chat" if has_chat or multi_turn else "alpaca"
    if template == "chat" and not has_chat:
        raise refuse(
            "dataset.template=chat",
            "This model's tokenizer has no chat template (it is probably a base model).",
            "model.chat_template=chatml   or   dataset.template=alpaca   or an -instruct model",
        )
    if template == "plain" and multi_turn:
        raise refuse("dataset.template=plain", "Turns need a template that marks who speaks.", "dataset.template=chat")
    if template == "plain":
        return SHAPES[shape].plain
    if template == "alpaca":
        return ALPACA
    return template.replace("\\n", "\n")


def render_row(row: dict, data: DatasetSettings, shape: Shape, template: str, tokenizer) -> Rendered:
    """One row as the text the model sees, without BOS or EOS where the tokenizer adds them itself."""
    if template == "plain":
        text = cell_text(row.get(data.columns.text), data.columns.text)
        return Rendered(text, [(0, len(text))] if text.strip() else [], "", text)
    if template == "chat":
        return render_chat(row_to_turns(row, data, shape), tokenizer, read_tools(row))
    named = names_in(template)
    for column, read in (("history", read_history), ("tools", read_tools)):
        if column not in named and read(row):
            raise refuse(f"a row with {column}", f"The template text has no place for {column}.", "dataset.template=chat")
    return render_text(template, row_to_fields(row, data, shape, template))


def render_text(template: str, values: dict[str, str]) -> Rendered:
    """Fill a template text; the span of `{output}` or `{completion}`, with what follows it, is the answer."""
    parts, start, length, reference = [], 0, 0, ""
    for literal, name, _, _ in string.Formatter().parse(template):
        value = values.get(name, "") if name else ""
        if name in ("output", "completion"):
            start, reference = length + len(literal), value
        parts += [literal, value]
        length += len(literal) + len(value)
    questions = [values.get("instruction"), values.get("input")]
    question = values.get("prompt") or "\n\n".join(v for v in questions if v)
    text = "".join(parts)
    spans = [(start, length)] if reference.strip() else []
    return Rendered(text, spans, question, reference)


def render_chat(turns: list[Turn], tokenizer, tools: list[dict] | None = None) -> Rendered:
    """Put turns through the tokenizer's chat template and find every assistant turn with its end mark.

    The template is rendered once with the real contents and once with a marker in place of each, so that an answer is
    found where it stands even if its words occur elsewhere. A span starts where generation would start (after the
    generation prompt), so that whatever the template puts before an answer, such as its reasoning, is trained on too. An answer
    whose reasoning the template leaves out is read and not trained on: it would teach to answer without thinking.
    Raises Refusal if the template refuses the turns, or leaves out or changes what one of them says.
    """
    # Reasoning models' templates look for a think block in an answer and may leave it out: it stays beside the marker. A turn
    # that calls a tool and says nothing stays so: templates write a line break where something is said.
    heads = [_think_block(turn) for turn in turns]
    silent = [i for i, turn in enumerate(turns) if turn.extra.get("tool_calls") and not turn.content.strip()]
    marks = ["" if i in silent else f"\ue000{i}\ue001" for i in range(len(turns))]
    text = _apply_template(turns, tokenizer, tools)
    given = [json.dumps(turn.extra) for turn in turns]
    parts = zip(turns, heads, marks, given, strict=True)
    marked = _marked_text(tuple((t.role, head + mark, t.reasoning, extra) for t, head, mark, extra in parts),
                          json.dumps(tools) if tools else "", tokenizer, tokenizer.chat_template)  # fmt: skip
    if len(marked) > MOST_TEMPLATE + len(json.dumps(tools)) + sum(map(len, (*heads, *given, *(t.reasoning for t in turns)))):
        why = f"It writes {len(marked):,} characters around what the turns say."
        raise refuse(f"the chat template of {_model_of(tokenizer)}", why, "model.chat_template=chatml")
    opening = _generation_prompt(tokenizer, tokenizer.chat_template)
    ends = _end_marks(tokenizer, opening)
    pieces = re.split("\ue000\\d+\ue001", marked)
    order = [int(m) for m in re.findall("\ue000(\\d+)\ue001", marked)]  # some templates move the system prompt
    if sorted(order) != [i for i in range(len(turns)) if i not in silent]:
        raise _unfit_template(turns, [turn for i, turn in enumerate(turns) if order.count(i) != (i not in silent)])
    notes = [f"key {key}" for turn in turns for key in turn.unused]
    if not re.search(r"(?<!function)(\.name\b|\[['\"]name['\"]\])", tokenizer.chat_template):
        notes += ["key name" for turn in turns if turn.extra.get("name") and turn.role != "tool"]
    if tools and not re.search(r"\btools\b", tokenizer.chat_template):
        notes.append("tools")
    spans, at, answered = [], 0, 0

    def learn(i: int, start: int, end: int, thought_lost: bool) -> None:
        nonlocal answered
        if turns[i].trained_on and not thought_lost:
            spans.append((start, end))
            answered = i
        else:
            notes.append("reasoning" if turns[i].trained_on else "weight")

    last = -1
    for i, before, after in zip([*order, len(turns)], [*pieces, ""], [*pieces[1:], ""], strict=False):
        calling = [j for j in silent if last < j < i]
        for j, (start, end) in zip(calling, _calls_in(before, opening, ends, turns[: i + 1], calling), strict=True):
            learn(j, at + start, at + end, turns[j].reasoning.strip() not in before[start:end])
        last = max(last, i)
        at += len(before)
        if i == len(turns):
            break
        turn, head = turns[i], heads[i]
        written = _trimmed(turn.content[len(head) :])
        if turn.role == "tool":  # which is only read: some templates write it as JSON
            written.append(json.dumps(turn.content, ensure_ascii=False)[1:-1])
        content = next((c for c in written if text.startswith(c + after, at)), None)
        if content is None:
            raise _unfit_template(turns, [turn])
        start, at = at, at + len(content)
        if turn.role == "assistant" and turn.content.strip():
            thought = (turn.reasoning or re.sub("</?think>", "", head)).strip()
            opened = before.find(opening) + len(opening) if opening and opening in before else 0
            thought_at = before.rfind(thought, opened) if thought else len(before)
            if opening and opening in before[: max(0, thought_at)]:
                start -= len(before) - before.rindex(opening, 0, thought_at) - len(opening)
            elif head and before.endswith(head):
                start -= len(head)
            learn(i, start, at + _end_of_turn(after, ends, bool(turn.extra.get("tool_calls"))), thought_at < 0)
    if at != len(text) or not text.startswith(pieces[0]):
        raise _unfit_template(turns, turns)
    spans.sort()
    question = next((t.content for t in reversed(turns[:answered]) if t.role == "user"), "")
    calls = turns[answered].extra.get("tool_calls")
    reference = turns[answered].content or (json.dumps(calls, ensure_ascii=False) if calls else "")
    return Rendered(text, spans, question, reference if spans else "", notes)


def _calls_in(piece: str, opening: str, ends: list[str], turns: list[Turn], calling: list[int]) -> list[tuple[int, int]]:
    """Where in a piece of the template's text those of `turns` stand that only call tools: from what opens the assistant's turn
    to its end mark. The content of the last turn follows the piece.
    """
    if not calling:
        return []
    starts = [m.end() for m in re.finditer(re.escape(opening), piece)] if opening else []
    if len(turns) > calling[-1] + 1 and turns[-1].role == "assistant":
        starts = starts[:-1]  # its own
    if len(starts) != len(calling):
        raise _unfit_template(turns, [turns[i] for i in calling])
    places = []
    for start, limit in zip(starts, [*starts[1:], len(piece)], strict=True):
        found = [(piece.find(mark, start, limit), len(mark)) for mark in ends]
        end = min((at + length for at, length in found if at >= 0), default=None)
        if end is None:
            raise _unfit_template(turns, [turns[i] for i in calling])
        places.append((start, end))
    return places


def _apply_template(turns: list[Turn], tokenizer, tools: list[dict] | None = None) -> str:
    """The chat template's text for these turns; what the template itself raises becomes a Refusal."""
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.content, **turn.extra} for turn in turns]
    if any(turn.extra.get("tool_calls") for turn in turns) and not re.search(r"\btool_calls\b", tokenizer.chat_template):
        why = f"The chat template of {_model_of(tokenizer)} has no place for calls: they would be left out."
        raise refuse("a row that calls a tool", why, "model.chat_template=<file>   that writes message.tool_calls")
    if any(turn.reasoning for turn in turns):
        key = next((key for key in REASONING if re.search(rf"\b{key}\b", tokenizer.chat_template)), None)
        if key is None:
            why = (
                f"The chat template of {_model_of(tokenizer)} has no place for it: the model would learn to answer without it."
            )
            fix = "write it into the answer as <think>...</think>, or name a template that writes message.reasoning_content:\n"
            raise refuse("a row with reasoning in a key of its own", why, fix + "model.chat_template=<file>")
        messages = [m | ({key: turn.reasoning} if turn.reasoning else {}) for m, turn in zip(messages, turns, strict=True)]
    try:
        return tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
    except TemplateError as error:
        if turns[0].role == "system" and "system" in str(error).lower():
            raise _no_system_role(tokenizer, f"it says: {first_line(error)}") from error
        roles = ", ".join(turn.role for turn in turns)
        why = f"The chat template of {_model_of(tokenizer)} refuses them: {first_line(error)}"
        raise refuse(f"a row with the turns {roles}", why, "model.chat_template=chatml") from error


@functools.lru_cache(maxsize=256)
def _marked_text(turns: tuple[tuple[str, str, str, str], ...], tools: str, tokenizer, chat_template: str) -> str:
    """The template's text with markers for contents: the same for all rows with the same roles and tools."""
    rebuilt = [Turn(role, content, reasoning, extra=json.loads(extra)) for role, content, reasoning, extra in turns]
    return _apply_template(rebuilt, tokenizer, json.loads(tools) if tools else None)


def _no_system_role(tokenizer, reason: str):
    why = f"The chat template of {_model_of(tokenizer)} has no place for a system prompt; {reason}"
    fix = "dataset.system_prompt=null   if it is set\ndataset.columns.system=null   if it comes from the data's own column\n"
    return refuse("a row with a system prompt", why, fix + "model.chat_template=chatml   takes one")


def _model_of(tokenizer) -> str:
    return tokenizer.name_or_path or "this model"


def _think_block(turn: Turn) -> str:
    """The `<think>...</think>` that opens an answer, with the line breaks after it; blank where there is none."""
    found = re.match(r"\s*<think>.*?</think>\n*", turn.content, re.S) if turn.role == "assistant" else None
    return found[0] if found else ""


def _trimmed(content: str) -> list[str]:
    """A content as templates write it: as it is, or without the white space around it."""
    return [content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"), content.lstrip("\n")]


def _end_of_turn(after: str, ends: list[str], calls: bool = False) -> int:
    """Length of the end mark right after an answer, and of the calls before it; 0 where the template puts none."""
    if calls:
        return min((after.find(mark) + len(mark) for mark in ends if mark in after), default=0)
    stripped = after.lstrip()
    for mark in ends:
        if stripped.startswith(mark):
            return len(after) - len(stripped) + len(mark)
    return 0


@functools.lru_cache(maxsize=4)
def _end_marks(tokenizer, opening: str) -> list[str]:
    """Special tokens that can close a turn: not the BOS, nor what opens the assistant's turn."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in opening}
    if tokenizer.bos_token != tokenizer.eos_token:
        special.discard(tokenizer.bos_token)
    return sorted(special, key=len, reverse=True)


@functools.lru_cache(maxsize=4)
def _generation_prompt(tokenizer, chat_template: str) -> str:
    """What the chat template adds where the model is to speak, such as `<|im_start|>assistant\\n`."""
    question = [{"role": "user", "content": "?"}]
    without = tokenizer.apply_chat_template(question, tokenize=False)
    with_it = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return with_it[len(without) :] if with_it.startswith(without) else ""


def _unfit_template(turns: list[Turn], changed: list[Turn]):
    roles = ", ".join(turn.role for turn in turns)
    which = ", ".join(dict.fromkeys(turn.role for turn in changed))
    why = "The chat template changes or leaves out what a turn says, so the target tokens could not be marked for certain."
    fix = "model.chat_template=chatml   writes every turn as it stands"
    if which == "system":
        fix = f"dataset.system_prompt=null   or   {fix}"
    return refuse(f"a row with the turns {roles}; changed: {which}", why, fix)
