"""Calls of tools: rendered by the tokenizer's own template exactly as it renders the whole conversation, calls trained on and
results only read."""

import json

import pytest

from sft.config.schema import DatasetSettings, Shape
from sft.data.columns import row_to_turns
from sft.data.templates import render_row
from sft.data.tokenize import IGNORED, encode
from sft.errors import Refusal
from sft.model.chat_template import CHATML

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
# Templates in the style of the families, written for these tests: calls after what is said, or on a line of their own.
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LINES = (
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}"
    "{% if m.role == 'tool' %}{{ '<tool_response>\\n' + m.content | tojson + '\\n</tool_response>' }}"
    "{% else %}{{ m.content | trim }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n' + call.function.name + ': ' + call.function.arguments | tojson + '\\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def call(city: str, text: bool = False, **more) -> dict:
    arguments = {"city": city}
    function = {"name": "get_weather", "arguments": json.dumps(arguments) if text else arguments}
    return {"type": "function", "function": function, **more}


def row(*calls: dict, said: str | None = None, **keys) -> dict:
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": said, "tool_calls": [*calls], **keys}]
    turns += [{"role": "tool", "content": '{"temp_c": 4}', "tool_call_id": "c1"}]
    return {"tools": TOOLS, "messages": [*turns, {"role": "assistant", "content": "4 degrees."}]}


@pytest.fixture
def learnt(make_tokenizer):
    """`learnt(row)`: (the text of a row, the parts of it that are trained on)."""

    def of(data: dict, template: str = CALLS, shape: Shape = Shape.messages) -> tuple[str, list[str]]:
        tokenizer = make_tokenizer(chat_template=template)
        rendered = render_row(data, DatasetSettings(), shape, "chat", tokenizer)
        (entry,) = encode([rendered], tokenizer, {tokenizer.eos_token_id})
        ids = [label for label in entry["labels"] if label != IGNORED]
        parts = [rendered.text[a:b] for a, b in rendered.spans]
        assert tokenizer.decode(ids) == "".join(parts)
        return rendered.text, parts

    return of


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("said", [None, "", "Let me look."])
def test_a_call_is_trained_on_whether_its_arguments_are_an_object_or_json_text(learnt, said, text):
    whole, parts = learnt(row(call("Bern", text), said=said))
    written = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call><|im_end|>'
    assert parts == [(said or "") + written, "4 degrees.<|im_end|>"]
    assert whole.startswith("<|im_start|>system\n[{") and '{"temp_c": 4}' in whole


def test_several_calls_at_once_and_two_turns_of_calls_stand_each_in_its_place(learnt):
    data = row(call("Bern"), call("Oslo"))
    data["messages"][2:2] = [{"role": "assistant", "content": None, "tool_calls": [call("Rome")]}]
    for template in (CALLS, LINES):
        _, parts = learnt(data, template)
        assert [sum(city in part for city in ("Bern", "Oslo", "Rome")) for part in parts] == [2, 1, 0]
        assert all(part.endswith("<|im_end|>") for part in parts)


def test_a_result_that_the_template_writes_as_json_is_only_read(learnt):
    whole, parts = learnt(row(call("Bern")), LINES)
    assert r'"{\"temp_c\": 4}"' in whole and not any("temp_c" in part for part in parts)


def test_sharegpts_turns_of_functions_are_calls_and_results(learnt):
    turns = [("human", "Weather?"), ("function_call", '{"name": "get_weather", "arguments": {"city": "Bern"}}'),
             ("observation", '{"temp_c": 4}'), ("gpt", "4 degrees.")]  # fmt: skip
    data = {"tools": json.dumps(TOOLS), "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert learnt(data, shape=Shape.conversations)[1] == learnt(row(call("Bern")))[1]


def test_the_older_function_call_is_a_call(learnt):
    data = row()
    older = {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    data["messages"][1] = {"role": "assistant", "content": None, "function_call": older}
    assert learnt(data)[1] == learnt(row(call("Bern")))[1]


def test_a_call_of_weight_0_is_read(learnt):
    assert learnt(row(call("Bern"), weight=0))[1] == ["4 degrees.<|im_end|>"]


def test_a_template_without_a_place_for_calls_refuses_the_row(learnt):
    with pytest.raises(Refusal, match="no place for calls"):
        learnt(row(call("Bern")), CHATML)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"tool_calls": [{"id": 1}]}, "a form that is not known"),
        ({"tool_calls": ["get_weather"]}, "a form that is not known"),
        ({"tool_calls": [call("x") | {"function": {"name": "f", "arguments": "{city"}}]}, "text that is no JSON"),
        ({"role": "user", "tool_calls": [call("Bern")]}, "only an assistant can"),
    ],
)
def test_calls_that_cannot_be_read_say_why(turn, words):
    with pytest.raises(ValueError, match=words):
        row_to_turns({"messages": [{"role": "assistant", "content": None, **turn}]}, DatasetSettings(), Shape.messages)


GLAIVE = (
    'USER: Weather?\n\n\nASSISTANT: <functioncall> {"name": "get_weather", "arguments": \'{"city": "Bern"}\'} '
    '<|endoftext|>\n\n\nFUNCTION RESPONSE: {"temp_c": 4}\n\n\nASSISTANT: 4 degrees. <|endoftext|>\n\n\n'
)


def test_a_transcript_is_the_turns_that_it_tells(learnt):
    """As glaive-function-calling-v2 has them: a system column and one text of the whole conversation."""
    whole, parts = learnt({"system": "SYSTEM: Use them if required -\n{}", "messages": GLAIVE})
    assert parts == learnt(row(call("Bern")))[1]
    assert whole.startswith("<|im_start|>system\nUse them if required -\n{}<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>")


def test_a_transcripts_call_that_cannot_be_read_says_why(learnt):
    with pytest.raises(ValueError, match="a call that is no JSON"):
        learnt({"messages": GLAIVE.replace("'}", "'")})


NULLS = (  # as DeepSeek's template, which calls where the content is null and takes arguments as text alone
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is none %}{% for call in m.tool_calls %}"
    "{{ call.function.name + ': ' + call.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("text", [False, True])
def test_calls_are_given_in_the_form_that_the_template_reads(learnt, text):
    assert learnt(row(call("Bern", text)), NULLS)[1][0] == 'get_weather: {"city": "Bern"}<|im_end|>'
    with pytest.raises(Refusal, match="leaves out the call of get_weather"):
        learnt(row(call("Bern", text), said="Let me look."), NULLS)
