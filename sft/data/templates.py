"""A row to text to tokens: the template, where the answers stand in it, BOS once and an end mark last."""

import functools
import json
import re
import string
from dataclasses import dataclass, field, replace

from sft.config.schema import ControlTokens, DatasetSettings, LossOn, Reasoning, Shape
from sft.data.cells import REASONING, Turn, cell_text, read_history, read_tools
from sft.data.columns import SHAPES, ignoring, names_in, row_is_read, row_to_fields, row_to_turns
from sft.errors import Refusal, first_line, refuse

WITH_SYSTEM = "a row with a system prompt"

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
    literal: list[tuple[int, int]] = field(default_factory=list)
    """Character ranges whose control tokens are plain text."""
    ends: int = 0
    """End marks that stand inside by right, in a text that holds turns."""
    lost: list[tuple[int, int, int]] = field(default_factory=list)
    """(turn, start, end) of each answer whose reasoning the chat template leaves out."""


def choose_template(data: DatasetSettings, shape: Shape, tokenizer) -> str:
    """`chat`, `plain`, or a template text: what `dataset.template` comes to for this data and tokenizer.

    A `\\n` typed on the command line, which shells and Hydra leave as two characters, is a line break in a template text.
    Raises Refusal if the template does not go with the rows or the tokenizer.
    """
    chosen = _choose_template(data, shape, tokenizer)
    if chosen != "chat":
        why = "Only a chat template reads it, and none is used."
        if data.chat_template_kwargs:
            raise refuse("dataset.chat_template_kwargs", why, "dataset.chat_template_kwargs={}   or   dataset.template=chat")
        if data.reasoning != Reasoning.template:
            what = f"dataset.reasoning={data.reasoning.value}"
            raise refuse(what, why, "dataset.reasoning=template   or   dataset.template=chat")
    return chosen


def _choose_template(data: DatasetSettings, shape: Shape, tokenizer) -> str:
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


def render_samples(row: dict, data: DatasetSettings, shape: Shape, template: str, tokenizer) -> list[Rendered]:
    """A row as the samples that are trained on: one, or under `dataset.reasoning=split` one an answer where the chat template
    would leave out the reasoning of some. Raises Refusal or ValueError for a row that cannot be trained on.
    """
    whole = render_row(row, data, shape, template, tokenizer)
    if not whole.lost or data.reasoning != Reasoning.split or data.loss_on == LossOn.last:
        return [whole]
    turns, tools = row_to_turns(row, data, shape), read_tools(row, data.columns)
    samples = []
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and turn.trained_on:
            before = [replace(one, trained_on=False) for one in turns[:i]]
            sample = render_chat([*before, turn], tokenizer, tools, data.special_tokens_in_text)
            samples.append(replace(sample, notes=["split"] if sample.spans else ["split", "reasoning"]))
    samples[0].notes += [note for note in whole.notes if note != "reasoning"]
    return samples


def render_row(row: dict, data: DatasetSettings, shape: Shape, template: str, tokenizer) -> Rendered:
    """One row as the text the model sees, without BOS or EOS where the tokenizer adds them itself."""
    if template == "plain":
        rendered = _render_plain(cell_text(row.get(data.columns.text), data.columns.text), tokenizer)
    elif template == "chat":
        turns, tools = row_to_turns(row, data, shape), read_tools(row, data.columns)
        if data.reasoning == Reasoning.strip:
            turns = [_without_reasoning(turn) for turn in turns]
        try:
            rendered = render_chat(turns, tokenizer, tools, data.special_tokens_in_text)
        except Refusal as refusal:
            raise _with_way_out(refusal, row, turns, data) from refusal
        if data.reasoning == Reasoning.keep:
            rendered = _put_back(rendered, turns, tools, tokenizer, data)
    else:
        named = names_in(template)
        for column, read in ((data.columns.history, read_history), (data.columns.tools, read_tools)):
            if column not in named and read(row, data.columns):
                raise refuse(f"a row with {column}", f"The template text has no place for {column}.", "dataset.template=chat")
        values = row_to_fields(row, data, shape, template)
        if SHAPES[shape].turns and values["system"] and "system" not in named:
            fix = "dataset.template=chat   or a template text with {system}"
            raise refuse("a row with a system prompt", "The template text has no place for it.", fix)
        rendered = render_text(template, values, tokenizer, data.special_tokens_in_text)
    if row_is_read(row, data):
        rendered.notes += ["weight"] * len(rendered.spans)
        rendered.spans = []
    return rendered


def _render_plain(text: str, tokenizer) -> Rendered:
    """A text as it stands. What follows its last end mark is white space and is cut; one that holds turns holds end marks."""
    ends = _end_marks(tokenizer, "")
    if text.rstrip().endswith(tuple(ends)):
        text = text.rstrip()
    opening = _generation_prompt(tokenizer, tokenizer.chat_template).strip() if tokenizer.chat_template else ""
    turns = sum(text.count(mark) for mark in ends) if opening and opening in text else 0
    return Rendered(text, [(0, len(text))] if text.strip() else [], "", text, ends=turns)


def _without_reasoning(turn: Turn) -> Turn:
    """An answer without what was thought before it."""
    return replace(turn, reasoning="", content=turn.content[len(_think_block(turn)) :])


def _put_back(rendered: Rendered, turns: list[Turn], tools: list[dict], tokenizer, data: DatasetSettings) -> Rendered:
    """The row with each answer as the template writes it when it is the last: with its reasoning."""
    for i, start, end in sorted(rendered.lost, reverse=True):
        alone = render_chat([*turns[:i], replace(turns[i], trained_on=True)], tokenizer, tools, data.special_tokens_in_text)
        if any(turn == i for turn, *_ in alone.lost):
            continue  # the template leaves it out everywhere
        begin, stop = alone.spans[-1]
        grown = stop - begin - (end - start)
        rendered.text = rendered.text[:start] + alone.text[begin:stop] + rendered.text[end:]
        rendered.spans, rendered.literal = (
            [(a + grown, b + grown) if a >= end else (a, b) for a, b in some] for some in (rendered.spans, rendered.literal)
        )
        rendered.spans = sorted(rendered.spans + ([(start, start + stop - begin)] if turns[i].trained_on else []))
        if turns[i].trained_on:
            rendered.notes.remove("reasoning")
    return rendered


def render_text(template: str, values: dict[str, str], tokenizer=None, marks: ControlTokens = ControlTokens.keep) -> Rendered:
    """Fill a template text; the span of `{output}` or `{completion}`, with what follows it, is the answer."""
    parts, contents, start, length, reference = [], [], 0, 0, ""
    for literal, name, _, _ in string.Formatter().parse(template):
        value = values.get(name, "") if name else ""
        begin = length + len(literal)
        if name in ("output", "completion"):
            start, reference = begin, value
        else:
            contents.append((begin, begin + len(value)))
        parts += [literal, value]
        length = begin + len(value)
    questions = [values.get("instruction"), values.get("input")]
    question = values.get("prompt") or "\n\n".join(v for v in questions if v)
    spans = [(start, length)] if reference.strip() else []
    return _read_as_text(Rendered("".join(parts), spans, question, reference), contents, tokenizer, marks)


def _read_as_text(rendered: Rendered, contents: list[tuple[int, int]], tokenizer, marks: ControlTokens) -> Rendered:
    """Note which of the `contents` hold control tokens, and read those as plain text if `marks` says so."""
    if marks == ControlTokens.text:
        control = _control_tokens(tokenizer)
        rendered.literal = [(a, b) for a, b in contents if control and control.search(rendered.text, a, b)]
        rendered.notes += ["control tokens"] * bool(rendered.literal)
    return rendered


@functools.lru_cache(maxsize=4)
def _control_tokens(tokenizer) -> re.Pattern | None:
    """Finds special tokens in a text; None for a tokenizer without any."""
    special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
    return re.compile("|".join(sorted(special, key=len, reverse=True))) if special else None


def render_chat(
    turns: list[Turn], tokenizer, tools: list[dict] | None = None, marks: ControlTokens = ControlTokens.text
) -> Rendered:
    """Put turns through the tokenizer's chat template and find every assistant turn with its end mark.

    The template is rendered once with the real contents and once with a marker in place of each, so that an answer is
    found where it stands even if its words occur elsewhere. A span starts where generation would start (after the
    generation prompt), so that whatever the template puts before an answer, such as its reasoning, is trained on too. An answer
    whose reasoning the template leaves out is read and not trained on: it would teach to answer without thinking.
    Raises Refusal if the template refuses the turns, or leaves out or changes what one of them says.
    """
    turns, text = _render_calls(turns, tokenizer, tools)
    heads = [_think_block(turn) for turn in turns]
    pieces, order, silent = _frame(turns, heads, tokenizer, tools)
    opening = _generation_prompt(tokenizer, tokenizer.chat_template)
    ends = _end_marks(tokenizer, opening)
    answers: list[tuple[int, int, int, bool]] = []  # turn, start, end, whether its reasoning is left out
    contents, at, last = [], 0, -1
    for i, before, after in zip([*order, len(turns)], [*pieces, ""], [*pieces[1:], ""], strict=False):
        calling = [j for j in silent if last < j < i]
        for j, (start, end) in zip(calling, _calls_in(before, opening, turns[: i + 1], calling, tokenizer), strict=True):
            answers.append((j, at + start, at + end, turns[j].reasoning.strip() not in before[start:end]))
        last = max(last, i)
        at += len(before)
        if i == len(turns):
            break
        turn, head = turns[i], heads[i]
        content = turn.content[len(head) :]
        if not text.startswith(content + after, at):
            content = next((c for c in _as_written(turn, content) if text.startswith(c + after, at)), None)
        if content is None:
            raise _unfit_template(turns, [turn])
        start, at = at, at + len(content)
        if turn.role != "assistant":
            contents.append((start, at))
        elif turn.content.strip():
            back, lost = _start_of_answer(before, opening, head, turn)
            calls = turn.extra.get("tool_calls")
            end = at + (_end_of_calls(after, calls, ends, tokenizer) if calls else _end_of_turn(after, ends))
            answers.append((i, start - back, end, lost))
    if at != len(text) or not text.startswith(pieces[0]):
        raise _unfit_template(turns, turns)
    trained = [(start, end, i) for i, start, end, lost in answers if turns[i].trained_on and not lost]
    notes = _left_out(turns, tokenizer, tools)
    notes += ["reasoning" if turns[i].trained_on else "weight" for i, _, _, lost in answers if lost or not turns[i].trained_on]
    answered = max(trained)[2] if trained else 0
    question = next((t.content for t in reversed(turns[:answered]) if t.role == "user"), "")
    calls = turns[answered].extra.get("tool_calls")
    reference = turns[answered].content or (json.dumps(calls, ensure_ascii=False) if calls else "")
    spans, lost = sorted((start, end) for start, end, _ in trained), [answer[:3] for answer in answers if answer[3]]
    rendered = Rendered(text, spans, question, reference if spans else "", notes, lost=lost)
    return _read_as_text(rendered, contents, tokenizer, marks)


def _frame(turns: list[Turn], heads: list[str], tokenizer, tools: list[dict] | None) -> tuple[list[str], list[int], list[int]]:
    """(what the template writes around the contents, the turns in the order of their contents, turns that only call tools).

    Reasoning models' templates look for a think block in an answer and may leave it out: it stays beside the marker. A turn
    that calls a tool and says nothing stays so: templates write a line break after one.
    """
    silent = [i for i, turn in enumerate(turns) if turn.extra.get("tool_calls") and not turn.content.strip()]
    marks = ["" if i in silent else f"\ue000{i}\ue001" for i in range(len(turns))]
    given = [json.dumps(turn.extra) if turn.extra else "{}" for turn in turns]
    parts = zip(turns, heads, marks, given, strict=True)
    marked = tuple((t.role, head + mark, t.reasoning, extra, t.is_null) for t, head, mark, extra in parts)
    pieces, order, length = _marked_pieces(marked, json.dumps(tools) if tools else "", tokenizer, tokenizer.chat_template)
    if length > MOST_TEMPLATE:
        room = MOST_TEMPLATE + len(json.dumps(tools)) + sum(map(len, (*heads, *given, *(t.reasoning for t in turns))))
        if length > room:
            why = f"It writes {length:,} characters around what the turns say."
            raise refuse(f"the chat template of {_model_of(tokenizer)}", why, "model.chat_template=chatml")
    if sorted(order) != [i for i in range(len(turns)) if i not in silent]:
        raise _unfit_template(turns, [turn for i, turn in enumerate(turns) if order.count(i) != (i not in silent)])
    return pieces, order, silent


def _as_written(turn: Turn, content: str) -> list[str]:
    """A turn's content as templates may write it: without the white space around it; a result also as JSON."""
    written = [content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"), content.lstrip("\n")]
    return [*written, json.dumps(turn.content, ensure_ascii=False)[1:-1]] if turn.role == "tool" else written


def _start_of_answer(before: str, opening: str, head: str, turn: Turn) -> tuple[int, bool]:
    """(characters before an answer's content where it begins, whether its reasoning is left out of what stands before it)."""
    thought = (turn.reasoning or re.sub("</?think>", "", head)).strip()
    opened = before.rfind(opening) + len(opening) if opening and opening in before else 0
    thought_at = before.rfind(thought, opened) if thought else len(before)
    if thought_at < 0:
        return len(before) - opened if opened else 0, True
    if opening and opening in before[:thought_at]:
        return len(before) - before.rindex(opening, 0, thought_at) - len(opening), False
    return len(head) if head and before.endswith(head) else 0, False


def _left_out(turns: list[Turn], tokenizer, tools: list[dict] | None) -> list[str]:
    """Notes of the keys and tools that this template has no place for."""
    notes = [f"key {key}" for turn in turns for key in turn.unused]
    named = sum(turn.role != "tool" and bool(turn.extra.get("name")) for turn in turns)
    if named and not re.search(r"(?<!function)(\.name\b|\[['\"]name['\"]\])", tokenizer.chat_template):
        notes += ["key name"] * named
    if tools and not re.search(r"\btools\b", tokenizer.chat_template):
        notes.append("tools")
    return notes


def _calls_in(piece: str, opening: str, turns: list[Turn], calling: list[int], tokenizer) -> list[tuple[int, int]]:
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
    places, ends = [], _end_marks(tokenizer, opening)
    for i, start, limit in zip(calling, starts, [*starts[1:], len(piece)], strict=True):
        places.append((start, start + _end_of_calls(piece[start:limit], turns[i].extra["tool_calls"], ends, tokenizer)))
    return places


def _end_of_calls(piece: str, calls: list[dict], ends: list[str], tokenizer) -> int:
    """Length of the calls that a piece of the template's text begins with, and of the end mark behind them.

    Control tokens may also stand between and around calls, so that the mark is looked for behind the last of what they say.
    Raises Refusal if a call's name is not in the piece or no mark follows it.
    """
    at = 0
    for call in calls:
        name = call["function"]["name"]
        if piece.find(name, at) < 0:
            why = f"The chat template of {_model_of(tokenizer)} leaves out the call of {name} there."
            raise refuse("a row that calls a tool", why, "model.chat_template=<file>   that writes message.tool_calls")
        at = piece.find(name, at) + len(name)
    values = calls[-1]["function"]["arguments"]
    words = [values] if isinstance(values, str) else values.values() if isinstance(values, dict) else []
    words = [word for word in words if isinstance(word, str) and word]
    at = max([at, *(found + len(word) for word in words if (found := piece.rfind(word)) >= at)])
    marks = [tokenizer.eos_token] if piece.find(tokenizer.eos_token, at) >= 0 else ends
    end = min((piece.find(mark, at) + len(mark) for mark in marks if piece.find(mark, at) >= 0), default=None)
    if end is None:
        why = f"The chat template of {_model_of(tokenizer)} puts no end mark behind its calls."
        raise refuse("a row that calls a tool", why, "model.chat_template=<file>   that ends every turn with a control token")
    return end


def _render_calls(turns: list[Turn], tokenizer, tools: list[dict] | None) -> tuple[list[Turn], str]:
    """(turns, the template's text for them), with calls in the form that this template reads.

    A null content beside calls stays null and arguments stay an object, unless the template leaves calls out, fails, or writes
    the word None: then the content is blank, or the arguments are JSON text.
    """
    names = [call["function"]["name"] for turn in turns if turn.extra for call in turn.extra.get("tool_calls", [])]
    if not names:
        return turns, _apply_template(turns, tokenizer, tools)
    texts: list[tuple[int, list[Turn], str]] = []
    failed: Exception | None = None
    for as_text, null in ((False, True), (False, False), (True, True), (True, False)):
        form = [_in_form(turn, null, as_text) for turn in turns]
        try:
            text = _apply_template(form, tokenizer, tools)
        except (Refusal, TypeError) as error:
            failed = failed or error
            continue
        if "None" not in text and all(text.count(name) >= names.count(name) for name in names):
            return form, text
        texts.append((sum(text.count(name) for name in {*names}) - text.count("None"), form, text))
    if not texts:
        raise failed
    _, form, text = max(texts, key=lambda one: one[0])
    return form, text


def _in_form(turn: Turn, null: bool, as_text: bool) -> Turn:
    """A turn with its null content null or blank, and the arguments of its calls as objects or as JSON text."""
    if not turn.extra.get("tool_calls"):
        return turn
    extra = turn.extra
    if as_text:
        functions = [call["function"] for call in extra["tool_calls"]]
        written = [one | {"arguments": json.dumps(one["arguments"], ensure_ascii=False)} for one in functions]
        calls = [call | {"function": one} for call, one in zip(extra["tool_calls"], written, strict=True)]
        extra = extra | {"tool_calls": calls}
    return replace(turn, is_null=turn.is_null and null, extra=extra)


def _apply_template(turns: list[Turn], tokenizer, tools: list[dict] | None = None) -> str:
    """The chat template's text for these turns; what the template itself raises becomes a Refusal."""
    from jinja2 import TemplateError

    messages = [{"role": t.role, "content": None if t.is_null else t.content, **t.extra} for t in turns]
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
def _marked_pieces(
    turns: tuple[tuple[str, str, str, str, bool], ...], tools: str, tokenizer, chat_template: str
) -> tuple[list[str], list[int], int]:
    """(the template's text around markers for contents, the turns of the markers, the length with them), which are the same
    for all rows with the same roles and tools. Some templates move the system prompt.
    """
    rebuilt = [Turn(role, content, thought, True, json.loads(extra), null) for role, content, thought, extra, null in turns]
    marked = _apply_template(rebuilt, tokenizer, json.loads(tools) if tools else None)
    pieces = re.split("\ue000(\\d+)\ue001", marked)
    return pieces[::2], [int(number) for number in pieces[1::2]], len(marked)


def _no_system_role(tokenizer, reason: str):
    why = f"The chat template of {_model_of(tokenizer)} has no place for a system prompt; {reason}"
    return refuse(WITH_SYSTEM, why, "model.chat_template=chatml   takes one")


def _with_way_out(refusal: Refusal, row: dict, turns: list[Turn], data: DatasetSettings) -> Refusal:
    """A refusal of a system prompt with the override that leaves it out, where it is no turn of the row."""
    (problem,) = refusal.problems
    if problem.what != WITH_SYSTEM and not problem.what.endswith("; changed: system"):
        return refusal
    column, unset = data.columns.system, "dataset.system_prompt=null"
    if column and turns[0].content == cell_text(row.get(column), column):
        unset = f"dataset.columns.system=null {ignoring(column, data)}" + f" {unset}" * bool(data.system_prompt)
    elif turns[0].content != data.system_prompt:
        return refusal
    return Refusal([replace(problem, fix=f"{unset}   trains without it\n{problem.fix}")])


def _model_of(tokenizer) -> str:
    return tokenizer.name_or_path or "this model"


def _think_block(turn: Turn) -> str:
    """The `<think>...</think>` that opens an answer, with the line breaks before what follows; blank where there is none."""
    found = re.match(r"\s*<think>.*?</think>(?:\n*(?=\S))?", turn.content, re.S) if turn.role == "assistant" else None
    return found[0] if found else ""


def _end_of_turn(after: str, ends: list[str]) -> int:
    """Length of the end mark right after an answer; 0 where the template puts none."""
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


def opens_answers(tokenizer) -> bool:
    """Whether the chat template adds something where the model is to speak."""
    return bool(_generation_prompt(tokenizer, tokenizer.chat_template))


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
    return refuse(f"a row with the turns {roles}; changed: {which}", why, fix)
