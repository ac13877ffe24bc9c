"""Rows and chat templates in the style of the families, written for these tests."""

import pytest

from sft.errors import Refusal
from sft.model.chat_template import CHATML

# A reasoning model's template: reasoning of the last answer stays, that of earlier ones goes; tools come first.
REASONING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ChatML on a base model: the marks are ordinary text to its tokenizer.
PLAIN_MARKS = CHATML.replace("im_start", "von").replace("im_end", "fin")
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def refusal_of(run, *args, **options) -> str:
    with pytest.raises(Refusal) as refusal:
        run(*args, **options)
    return str(refusal.value)
