"""A row to text to tokens: the template, where the answers stand in it, BOS once and an end mark last."""

import functools
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from sft.columns import Turn, row_to_fields, row_to_turns
from sft.errors import refuse
from sft.settings import DatasetSettings, Settings, Shape

IGNORED = -100
"""Label of a token that is not learnt, as torch's cross entropy has it."""

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
    """What was asked, for people to read."""
    reference: str
    """The answer in the data, for people to read."""


def choose_template(data: DatasetSettings, shape: Shape, tokenizer) -> str:
    """`chat`, `plain`, or a template text: what `dataset.template` comes to for this data and tokenizer."""
    has_chat = bool(tokenizer.chat_template)
    multi_turn = shape in (Shape.messages, Shape.conversations)
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
        raise refuse("dataset.template=plain", "Turns need a template that tells the speakers apart.", "dataset.template=chat")
    if template == "plain":
        return "{prompt}{completion}" if shape == Shape.prompt_completion else "{instruction}\n\n{input}\n\n{output}"
    if template == "alpaca":
        return ALPACA
    return template


def render_row(row: dict, data: DatasetSettings, shape: Shape, template: str, tokenizer) -> Rendered:
    """One row as the text the model sees, without BOS or EOS where the tokenizer adds them itself."""
    if template == "plain":
        text = str(row.get(data.columns.text) or "")
        return Rendered(text, [(0, len(text))], "", text)
    if template == "chat":
        return render_chat(row_to_turns(row, data, shape), tokenizer)
    return render_text(template, row_to_fields(row, data, shape))


def render_text(template: str, values: dict[str, str]) -> Rendered:
    """Fill a template text; the span of `{output}` or `{completion}`, with what follows it, is the answer."""
    parts, start, length, reference = [], 0, 0, ""
    for literal, name, _, _ in string.Formatter().parse(template):
        value = values.get(name, "") if name else ""
        if name in ("output", "completion"):
            start, reference = length + len(literal), value
        parts += [literal, value]
        length += len(literal) + len(value)
    question = "\n".join(v for k, v in values.items() if k in ("instruction", "input", "prompt") and v)
    text = "".join(parts)
    spans = [(start, length)] if reference.strip() else []
    return Rendered(text, spans, question, reference)


def render_chat(turns: list[Turn], tokenizer) -> Rendered:
    """Put turns through the tokenizer's chat template and find every assistant turn with its end mark.

    The template is rendered once with the real contents and once with a marker in place of each, so that an answer is
    found where it stands even if its words occur elsewhere. A span starts where generation would start (after the
    generation prompt), so that whatever the template puts before an answer, such as an empty think block, is learnt too.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
    marked = tokenizer.apply_chat_template(
        [m | {"content": mark} for m, mark in zip(messages, marks, strict=True)], tokenize=False
    )
    ends = _end_marks(tokenizer)
    opening = _generation_prompt(tokenizer)
    pieces = re.split("\ue000\\d+\ue001", marked)
    if [int(m) for m in re.findall("\ue000(\\d+)\ue001", marked)] != list(range(len(turns))):
        raise _unfit_template(turns)
    spans, rebuilt = [], pieces[0]
    for turn, before, after in zip(turns, pieces, pieces[1:], strict=False):
        content = turn.content if text.startswith(rebuilt + turn.content, 0) else turn.content.strip()
        start = len(rebuilt)
        rebuilt += content
        if turn.role == "assistant" and content:
            if opening and opening in before:
                start -= len(before) - before.rindex(opening) - len(opening)
            spans.append((start, len(rebuilt) + _end_of_turn(after, ends)))
        rebuilt += after
    if rebuilt != text:
        raise _unfit_template(turns)
    question = next((t.content for t in reversed(turns) if t.role == "user"), "")
    reference = next((t.content for t in reversed(turns) if t.role == "assistant"), "")
    return Rendered(text, spans, question, reference)


def _end_of_turn(after: str, ends: list[str]) -> int:
    """Length of the end mark right after an answer, 0 where the template puts none."""
    stripped = after.lstrip()
    for mark in ends:
        if stripped.startswith(mark):
            return len(after) - len(stripped) + len(mark)
    return 0


@functools.lru_cache(maxsize=4)
def _end_marks(tokenizer) -> list[str]:
    return sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)


@functools.lru_cache(maxsize=4)
def _generation_prompt(tokenizer) -> str:
    """What the chat template adds where the model is to speak, such as `<|im_start|>assistant\\n`."""
    question = [{"role": "user", "content": "?"}]
    without = tokenizer.apply_chat_template(question, tokenize=False)
    with_it = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return with_it[len(without) :] if with_it.startswith(without) else ""


def _unfit_template(turns: list[Turn]):
    roles = ", ".join(turn.role for turn in turns)
    return refuse(
        f"a row with the turns {roles}",
        "The chat template changes or leaves out a turn's content, so what is learnt could not be marked for certain.",
        "model.chat_template=chatml   or drop such rows: dataset.drop={messages: ...}",
    )


def encode(rendered: list[Rendered], tokenizer, stop_ids: set[int]) -> Iterable[dict]:
    """Token ids and answer labels of rendered rows: BOS exactly once where the tokenizer wants one, an end mark last.

    Yields dicts with `input_ids`, `labels` (IGNORED outside the answers), `prompt_length` (tokens before the last
    answer), `question`, `reference`, and `boundary_merge` (a token joins the prompt's end to the answer's start).
    """
    bos = starts_with_bos(tokenizer)
    texts = [r.text.removeprefix(tokenizer.bos_token) if bos else r.text for r in rendered]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for row, text, ids, offsets in zip(rendered, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        shift = len(row.text) - len(text)
        labels = [IGNORED] * len(ids)
        merged, prompt_length = False, len(ids) if not row.spans else 0
        for begin, end in row.spans:
            begin, end = begin - shift, end - shift
            inside = [k for k, (a, b) in enumerate(offsets) if a < end and b > begin]
            for k in inside:
                labels[k] = ids[k]
            if inside:
                merged |= offsets[inside[0]][0] < begin
                prompt_length = inside[0]
        ids = list(ids)
        # The answer ends where generation stops. A template without an end mark of its own gets the tokenizer's EOS.
        tail = [k for k in range(len(ids)) if labels[k] != IGNORED]
        if tail and ids[tail[-1]] not in stop_ids:
            if tail[-1] + 1 < len(ids):  # only white space can follow; it would keep the model from stopping
                del ids[tail[-1] + 1 :], labels[tail[-1] + 1 :]
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        if bos:
            ids, labels, prompt_length = [tokenizer.bos_token_id, *ids], [IGNORED, *labels], prompt_length + 1
        yield {
            "input_ids": ids, "labels": labels, "prompt_length": prompt_length,
            "question": row.question, "reference": row.reference, "boundary_merge": merged,
        }  # fmt: skip


def starts_with_bos(tokenizer) -> bool:
    """Whether this tokenizer puts a BOS before a text by itself, as Llama's does and Qwen's does not."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def prompt_ids(question: str, settings: Settings, shape: Shape, tokenizer) -> list[int]:
    """Token ids of a question of the user's own, put through the data's template up to where the answer starts."""
    data = settings.dataset
    template = choose_template(data, shape, tokenizer)
    if template == "chat":
        turns = [Turn("system", data.system_prompt)] if data.system_prompt else []
        rendered = render_chat([*turns, Turn("user", question), Turn("assistant", "x")], tokenizer)
    elif template == "plain":
        rendered = Rendered(question, [], question, "")
    else:
        role = "prompt" if "{prompt}" in template else "input" if data.columns.instruction is None else "instruction"
        rendered = render_text(template, {role: question, "output": "x", "completion": "x", "system": data.system_prompt or ""})
    text = rendered.text[: rendered.spans[0][0]] if rendered.spans else rendered.text
    bos = starts_with_bos(tokenizer)
    ids = tokenizer(text.removeprefix(tokenizer.bos_token) if bos else text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if bos else ids
