"""Which chat template is taken, and the variables that are set in it."""

import json

import pytest
from transformers import AutoTokenizer

from sft.config.schema import ModelSettings
from sft.errors import Refusal
from sft.model import builtin
from sft.model.chat_template import CHATML, choose_template, set_variables
from sft.model.tokenizer import load_tokenizer
from tests.data.miniatures import TOOL, user

THINKS = (
    "{%- macro begin() %}{{ 'assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if note is defined %}{{ note | tojson }}{% endif %}"
    "{% if add_generation_prompt %}{{ begin() }}{% endif %}"
)
ASKED = [user("Hi?")]


@pytest.mark.parametrize(
    "variables",
    [
        {"enable_thinking": True},
        {"enable_thinking": False},
        {"enable_thinking": None},
        {"note": 'it\'s "so"\n%} {{ x }} 👪 \\'},
        {"note": {"a": [1, 2.5, True, None, "é"]}, "enable_thinking": True},
    ],
)
def test_a_template_with_variables_set_writes_what_it_writes_when_given_them(tokenizer, variables):
    for prompt in (False, True):
        given = tokenizer.apply_chat_template(
            ASKED, chat_template=THINKS, tokenize=False, add_generation_prompt=prompt, **variables
        )
        text = set_variables(THINKS, variables, "m")
        assert tokenizer.apply_chat_template(ASKED, chat_template=text, tokenize=False, add_generation_prompt=prompt) == given
        assert set_variables(text, variables, "m") == text  # as a run's own tokenizer has it


@pytest.mark.parametrize(
    ("template", "variables", "words"),
    [
        (THINKS, {"enable_thinkin": True}, "does not read it; it reads enable_thinking, note"),
        (CHATML, {"enable_thinking": True}, "it reads none"),
        (THINKS, {"messages": []}, "given to every chat template already"),
        (None, {"enable_thinking": True}, "has no chat template"),
        (THINKS, {"note": float("nan")}, "takes texts, numbers"),
    ],
)
def test_a_variable_that_would_have_no_effect_is_refused(template, variables, words):
    with pytest.raises(Refusal, match=words):
        set_variables(template, variables, "m")


# --------------------------------------------------------------------------------------------------- named templates

PLAIN = "\n{% for m in messages %}{{ m.content }}{% endfor %}\n"
WITH_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}\n\n"


def test_of_several_templates_default_is_taken_and_tool_use_for_rows_with_tools(tokenizer):
    own = {"default": PLAIN, "tool_use": WITH_TOOLS}
    text = choose_template(own, None, "m")
    for tools, wanted in (None, PLAIN), ([TOOL], WITH_TOOLS):
        given = tokenizer.apply_chat_template(ASKED, tools=tools, chat_template=wanted, tokenize=False)
        assert tokenizer.apply_chat_template(ASKED, tools=tools, chat_template=text, tokenize=False) == given
    assert choose_template({"default": PLAIN, "tool_use": PLAIN}, None, "m") == PLAIN
    assert choose_template({"default": PLAIN, "rag": WITH_TOOLS}, "rag", "m") == WITH_TOOLS


def test_without_a_default_one_is_to_be_named(tokenizer):
    with pytest.raises(Refusal, match=r"model\.chat_template=rag"):
        choose_template({"rag": PLAIN, "tool_use": WITH_TOOLS}, None, "m")
    with pytest.raises(Refusal, match="one of the tokenizer's own templates: rag, tool_use"):
        choose_template({"rag": PLAIN, "tool_use": WITH_TOOLS}, "rga", "m")


def test_a_model_with_two_named_templates_is_loaded_with_one_text(tmp_path):
    """As Command R, Hermes and Mixtral have them."""
    tokenizer = AutoTokenizer.from_pretrained(builtin.local_model(builtin.TINY_RANDOM, weights=False))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": WITH_TOOLS}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": names}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 49152}))
    loaded, _ = load_tokenizer(ModelSettings(name=str(tmp_path)))
    assert loaded.apply_chat_template(ASKED, tokenize=False) == "<|im_start|>user\nHi?<|im_end|>\n"
    assert '"get_weather"' in loaded.apply_chat_template(ASKED, tools=[TOOL], tokenize=False)
