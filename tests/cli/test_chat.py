"""What a chat asks is what training asked, whatever was said before; what does not fit ends no chat."""

import builtins
import json
import re
from types import SimpleNamespace

import pytest

from sft.cli import talk as chat
from sft.cli.chat import Speaker
from sft.config.schema import DatasetSettings, ModelSettings, Settings, Shape
from sft.data.templates import render_row
from sft.data.tokenize import encode
from sft.errors import Refusal
from sft.model.chat_template import CHATML
from sft.model.tokenizer import load_tokenizer
from sft.sanitize import shown
from sft.storage.jsonio import jsonable
from tests.data.test_templates import LLAMA3, MISTRAL, QWEN3


class Said(Speaker):
    """A speaker without a model: it remembers the prompts and says what it is given."""

    def __init__(self, tokenizer, settings, answers=("x",)):
        self.tokenizer, self.settings, self.shape = tokenizer, settings, Shape.messages
        self.answers, self.asked, self.target = list(answers), [], SimpleNamespace(name="said")

    def complete(self, ids, say, max_new_tokens, temperature=0.0):
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


DAMAGE = {
    "tokenizer.json": ("{", '{"version": 7}', '{"version": "1.0", "model": {"type": "BPE"}}', "\0"),
    "tokenizer_config.json": ("{", "[]", '{"tokenizer_class": 7}', '{"added_tokens_decoder": [1]}'),
    "preflight.json": [f'{{"shape": "messages", "stop_tokens": {stops}}}' for stops in ('["<no such>"]', "[[1]]", '"</s>"')],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_tokenizer_that_cannot_be_read_is_refused_with_its_folder(make_tokenizer, tmp_path, capsys, name, text):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "adapter")
    record = {"status": "finished", "settings": jsonable(Settings())}
    preflight = {"shape": "messages", "stop_tokens": [tokenizer.eos_token]}
    for file, content in {"run.json": record, "preflight.json": preflight}.items():
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    place = tmp_path / name if name == "preflight.json" else tmp_path / "adapter"
    (place if place.is_file() else place / name).write_text(text, encoding="utf-8")
    assert chat.main([f"run={tmp_path}", "prompt=why?"]) == 2
    said = capsys.readouterr().err
    assert "Refused: 1 problem" in said and str(tmp_path) in said and "hint: bring the file" in said


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in list(DAMAGE)[:2] for text in DAMAGE[name]])
def test_a_models_tokenizer_that_cannot_be_read_is_refused_with_the_models_name(make_tokenizer, tmp_path, name, text):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(Refusal, match=re.escape(f"model.name={tmp_path}")):
        load_tokenizer(ModelSettings(name=str(tmp_path)))


def test_a_template_text_takes_the_last_question_alone(tokenizer):
    settings = Settings(dataset=DatasetSettings(template="alpaca", system_prompt="s"))
    speaker = Said(tokenizer, settings)
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "two?"}]
    assert speaker.prompt(turns) == speaker.prompt(turns[-1:]) and not speaker.remembers


def test_what_moves_the_cursor_is_shown_and_other_scripts_stay():
    assert shown("\x1b]0;t\x07\x9b2J\u2066\r") == "\\x1b]0;t\\x07\\x9b2J\\u2066\\r"
    for text in ("\u3000\u3000段落，开头", "👨\u200d👩\u200d👧", "می\u200cخواهم", "a\n\tb"):
        assert shown(text) == text
