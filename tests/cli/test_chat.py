"""What a chat asks is what training asked, whatever was said before; what does not fit ends no chat."""

import builtins
from types import SimpleNamespace

import pytest

from scripts import chat
from sft.cli.chat import Speaker
from sft.config.schema import DatasetSettings, Settings, Shape
from sft.data.templates import render_row
from sft.data.tokenize import encode
from sft.model.tokenizer import CHATML
from sft.sanitize import shown
from tests.data.test_templates import LLAMA3, MISTRAL, QWEN3


class Said(Speaker):
    """A speaker without a model: it remembers the prompts and says what it is given."""

    def __init__(self, tokenizer, settings, answers=("x",)):
        self.tokenizer, self.settings, self.shape = tokenizer, settings, Shape.messages
        self.answers, self.asked, self.target = list(answers), [], SimpleNamespace(name="said")

    def answer(self, ids, say, max_new_tokens, temperature=0.0):
        self.asked.append(self.tokenizer.decode(ids))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        say(answer)
        return answer


def type_in(monkeypatch, *lines):
    lines = iter([*lines, "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(lines))


OPTIONS = {"max_new_tokens": 4, "temperature": 0.0}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, QWEN3])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_later_questions_are_asked_in_the_tokens_that_a_row_of_turns_has(make_tokenizer, template, system):
    """LLAMA3's prompt ends in two line breaks, which this tokenizer reads as one token where no answer follows them."""
    tokenizer = make_tokenizer(template, bos="<s>", adds_bos=True, special=("<|eot_id|>",))
    settings = Settings(dataset=DatasetSettings(system_prompt=system))
    speaker = Said(tokenizer, settings)
    roles = ("user", "assistant", "user", "assistant", "user")
    turns = [{"role": r, "content": c} for r, c in zip(roles, ("one?", "First.", "二？", "第二。", "three?"), strict=True)]
    row = {"messages": [*turns, {"role": "assistant", "content": "Third."}]}
    rendered = render_row(row, settings.dataset, Shape.messages, "chat", tokenizer)
    entry = next(iter(encode([rendered], tokenizer, {tokenizer.eos_token_id})))
    assert speaker.prompt(turns) == entry["input_ids"][: entry["prompt_length"]]


def test_turns_that_a_template_does_not_take_are_told_and_the_chat_goes_on(make_tokenizer, monkeypatch, capsys):
    template = "{{ raise_exception('Two turns at most') if messages | length > 2 }}" + CHATML
    speaker = Said(make_tokenizer(template), Settings(), ["First.", "Again."])
    type_in(monkeypatch, "one?", "two?", "/reset", "three?")
    chat.talk([speaker], OPTIONS)
    assert "Two turns at most" in capsys.readouterr().out
    assert [text.count("<|im_start|>user") for text in speaker.asked] == [1, 1] and "three?" in speaker.asked[1]


def test_two_that_talk_keep_the_same_conversation_when_one_is_stopped(make_tokenizer, monkeypatch, capsys):
    tokenizer = make_tokenizer(CHATML)
    first = Said(tokenizer, Settings(), ["a", "b"])
    second = Said(tokenizer, Settings(), [KeyboardInterrupt(), "c"])
    type_in(monkeypatch, "one?", "two?")
    chat.talk([first, second], OPTIONS)
    assert first.asked[1] == second.asked[1] and "one?" not in first.asked[1] and "(stopped)" in capsys.readouterr().out


def test_a_template_text_takes_the_last_question_alone(tokenizer):
    settings = Settings(dataset=DatasetSettings(template="alpaca", system_prompt="s"))
    speaker = Said(tokenizer, settings)
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "two?"}]
    assert speaker.prompt(turns) == speaker.prompt(turns[-1:]) and not speaker.remembers


def test_what_moves_the_cursor_is_shown_and_other_scripts_stay():
    assert shown("\x1b]0;t\x07\x9b2J\u2066\r") == "\\x1b]0;t\\x07\\x9b2J\\u2066\\r"
    for text in ("\u3000\u3000段落，开头", "👨\u200d👩\u200d👧", "می\u200cخواهم", "a\n\tb"):
        assert shown(text) == text
