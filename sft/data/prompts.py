"""Prompts for generation: the beginning of a row or of a conversation, up to where the answer starts."""

from sft.config.schema import Settings, Shape
from sft.data.cells import Turn
from sft.data.columns import question_row, row_to_fields
from sft.data.templates import Rendered, choose_template, render_chat, render_text
from sft.data.tokenize import encode, starts_with_bos


def prompt_ids(question: str, settings: Settings, shape: Shape, tokenizer) -> list[int]:
    """Token ids of a question of the user's own: those that a row with this question has before its answer."""
    return conversation_ids([Turn("user", question)], settings, shape, tokenizer)


def conversation_ids(turns: list[Turn], settings: Settings, shape: Shape, tokenizer) -> list[int]:
    """Token ids that a row has before its answer if these turns come before it; the last one is the user's.

    A template text has a place for one question: of the turns it takes the last one and the system prompt.
    Raises Refusal as `render_chat` does.
    """
    rendered = render_question(turns, settings, shape, tokenizer)
    entry = next(iter(encode([rendered], tokenizer, {tokenizer.eos_token_id})))
    return entry["input_ids"][: entry["prompt_length"]]


def conversation_text(turns: list[Turn], settings: Settings, shape: Shape, tokenizer) -> str:
    """The text whose tokens are `conversation_ids`, without a BOS that the tokenizer puts there itself."""
    rendered = render_question(turns, settings, shape, tokenizer)
    text = rendered.text
    if rendered.spans:
        begin, end = rendered.spans[-1]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # White space that makes one token with the answer's start is the answer's, as it is in `encode`.
        start = next(a for a, b in offsets if a < end and b > begin)
        text = text[: start if text[start:begin].isspace() else begin]
    return text.removeprefix(tokenizer.bos_token) if starts_with_bos(tokenizer) else text


def render_question(turns: list[Turn], settings: Settings, shape: Shape, tokenizer) -> Rendered:
    """A row that has these turns before its answer; a stand-in is the answer. A text is continued and has none."""
    data = settings.dataset
    template = choose_template(data, shape, tokenizer)
    question = turns[-1].content
    if template == "plain":
        return Rendered(question, [], question, "")
    if template == "chat" and data.system_prompt and turns[0].role != "system":
        turns = [Turn("system", data.system_prompt), *turns]
    if template == "chat":
        return render_chat([*turns, Turn("assistant", "x")], tokenizer, None, data.special_tokens_in_text)
    system = turns[0].content if turns[0].role == "system" else ""
    row = question_row(question, data.columns, shape)
    values = row_to_fields(row, data, shape, template)
    values |= {"system": system or data.system_prompt or ""}
    return render_text(template, values, tokenizer, data.special_tokens_in_text)
