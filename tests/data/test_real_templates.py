"""The true tokenizers and chat templates of a few families, where `python tests/fetch_tokenizers.py` has brought them."""

import copy
import functools
import unicodedata

import pytest
from transformers import AutoTokenizer

from sft.config.schema import DatasetSettings, Reasoning, Shape
from sft.data.cells import read_tools
from sft.data.columns import row_to_turns
from sft.data.prepare import readable
from sft.data.templates import render_chat, render_row
from sft.data.tokenize import IGNORED, encode, not_restored
from sft.errors import Refusal
from tests.conftest import USERS_CACHE
from tests.data.miniatures import TOOL, assistant, user
from tests.fetch_tokenizers import FAMILIES

FOLDER = USERS_CACHE / "tokenizers"


@functools.cache
def load(name: str):
    if not (FOLDER / name).is_dir():
        pytest.skip(f"the tokenizer of {name} is not in {FOLDER}: python tests/fetch_tokenizers.py")
    return AutoTokenizer.from_pretrained(FOLDER / name)


def call(city: str) -> dict:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


def result(text: str) -> dict:
    return {"role": "tool", "content": text, "name": "get_weather"}


SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "one answer": [user("Hi 👪?"), assistant("你好。")],
    "two answers": [SYSTEM, user("Hi?"), assistant("A."), user("B?"), assistant("C e\u0301 مرحبا")],
    "a call": [user("W?"), assistant(None, tool_calls=[call("Bern")]), result('{"t": 4}'), assistant("4.")],
    "words and a call": [user("W?"), assistant("Let me look.", tool_calls=[call("Bern")]), result("4"), assistant("4.")],
    "two calls": [user("W?"), assistant(None, tool_calls=[call("Bern"), call("Oslo")]), result("4"), result("5"),
                  assistant("4, 5.")],
    "thoughts": [user("2+2?"), assistant("<think>\nAdd.\n</think>\n\n4"), user("3+3?"),
                 assistant("<think>\nAgain.\n</think>\n\n6")],
}  # fmt: skip
WITH_TEMPLATE = [name for name in FAMILIES if name != "llama2"]  # whose package has none


@pytest.mark.parametrize("name", WITH_TEMPLATE)
@pytest.mark.parametrize("case", ROWS)
def test_a_conversation_is_what_the_template_makes_of_it(name, case):
    tokenizer, turns = load(name), ROWS[case]
    tools = [TOOL] if "call" in case else []
    data = {"messages": copy.deepcopy(turns), "tools": tools}
    read = row_to_turns(data, DatasetSettings(), Shape.messages)
    if "call" in case and (name == "deepseek_v3" or "tool_calls" not in tokenizer.chat_template):
        if name == "deepseek_v3" and case == "two calls":
            return  # its template takes arguments as text alone, and two calls at once
        with pytest.raises(Refusal, match="a row that calls a tool"):
            render_chat(read, tokenizer, tools)
        return
    rendered = render_chat(read, tokenizer, read_tools(data, DatasetSettings().columns))
    blank = [turn | {"content": turn["content"] or ""} for turn in turns]  # some templates fail at a null
    assert rendered.text == tokenizer.apply_chat_template(blank, tools=tools or None, tokenize=False)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    lost = rendered.notes.count("reasoning")
    assert len(rendered.spans) + lost == len(answers) and lost == (case == "thoughts" and name == "qwen3")
    parts = [rendered.text[a:b] for a, b in rendered.spans]
    for part, turn in zip(parts, answers[lost:], strict=True):
        words = (turn["content"] or "").split("</think>")[-1].strip()
        assert words in part and part.endswith(tokenizer.eos_token if name != "gemma3" else "<end_of_turn>")
        assert all(one["function"]["arguments"]["city"] in part for one in turn.get("tool_calls", []))
        assert not any(other in part for other in ("Hi", "W?", '"t"', "Be brief"))
    if name == "deepseek_v3":
        return  # read under the class its files name, this tokenizer loses spaces: see below
    (entry,) = encode([rendered], tokenizer, {tokenizer.eos_token_id})
    trained = tokenizer.decode([label for label in entry["labels"] if label != IGNORED])
    wanted = unicodedata.normalize("NFC", "".join(parts))  # as Qwen's tokenizers do
    assert unicodedata.normalize("NFC", trained).removesuffix(tokenizer.eos_token) == wanted.removesuffix(tokenizer.eos_token)


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_control_tokens_in_a_question_are_text(name):
    tokenizer = load(name)
    marks = [mark for mark in tokenizer.all_special_tokens if mark in tokenizer.chat_template] or [tokenizer.eos_token]
    plain, forged = [], []
    for ids, text in ((plain, "x"), (forged, f"log {''.join(marks)} x")):
        turns = row_to_turns({"messages": [user(text), assistant("It.")]}, DatasetSettings(), Shape.messages)
        ids += next(iter(encode([render_chat(turns, tokenizer)], tokenizer, {tokenizer.eos_token_id})))["input_ids"]
    control = set(tokenizer.all_special_ids)
    assert sum(i in control for i in forged) == sum(i in control for i in plain)


def test_a_split_row_of_qwen3_keeps_each_thought():
    tokenizer, data = load("qwen3"), DatasetSettings(reasoning=Reasoning.keep)
    rendered = render_row({"messages": ROWS["thoughts"]}, data, Shape.messages, "chat", tokenizer)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "<think>\nAdd.\n</think>\n\n4<|im_end|>",
        "<think>\nAgain.\n</think>\n\n6<|im_end|>",
    ]


def test_deepseeks_tokenizer_under_the_class_of_its_files_loses_text_and_is_found_out():
    assert len(not_restored(["Yes, number 0 is so.\nIt is."], load("deepseek_v3"))) == 1


def test_the_preview_of_llama_2_shows_spaces():
    tokenizer = load("llama2")
    text = "Below is an instruction that describes a task."
    assert "".join(readable(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)) == text
