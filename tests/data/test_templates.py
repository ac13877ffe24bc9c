"""What the model reads and what it learns: templates, masks, BOS and end marks."""

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft.config.schema import ColumnSettings, DatasetSettings, Settings, Shape
from sft.data.cells import Turn
from sft.data.columns import row_to_turns
from sft.data.prompts import prompt_ids
from sft.data.templates import ALPACA, choose_template, render_chat, render_row, render_text
from sft.data.tokenize import IGNORED, encode
from sft.errors import Refusal
from sft.model.chat_template import CHATML

ROOT = Path(__file__).resolve().parents[2]
RUOZHIBA = ROOT.parent / "shared" / "data" / "ruozhiba_qa.json"

# Chat templates in the style of the families, written for these tests.
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# An empty think block before the last answer only; the thoughts of earlier answers are left out.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>\n' }}{% else %}{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last and (loop.last or r) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}{% else %}"
    "{{ '<|im_start|>assistant\n' + c }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.revindex <= 2 and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m.content + ' [/INST]' }}{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
OPEN_ENDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"

CONVERSATION = [
    Turn("user", "one?"), Turn("assistant", "First."), Turn("user", "two?"), Turn("assistant", "Second."),
]  # fmt: skip


def encode_one(rendered, tokenizer, stop_ids=None) -> dict:
    return next(iter(encode([rendered], tokenizer, stop_ids or {tokenizer.eos_token_id})))


def learnt_parts(entry: dict, tokenizer) -> list[str]:
    """The texts of the runs of learnt tokens."""
    parts, before = [], False
    for i, label in zip(entry["input_ids"], entry["labels"], strict=True):
        if label != IGNORED:
            assert label == i
            parts = parts if before else [*parts, []]
            parts[-1].append(i)
        before = label != IGNORED
    return [tokenizer.decode(part) for part in parts]


def chat(turns, tokenizer, stop_ids=None) -> tuple[dict, list[str]]:
    entry = encode_one(render_chat(turns, tokenizer), tokenizer, stop_ids)
    return entry, learnt_parts(entry, tokenizer)


# ------------------------------------------------------------------------------------------ string templates


def notebook_text(question: str, answer: str, eos: str) -> str:
    """The Unsloth notebook's formatting function, for data with a question and an answer."""
    alpaca_prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
    )
    return alpaca_prompt.format("", question, answer) + eos


def test_ruozhiba_is_the_notebooks_text_to_the_letter(tokenizer, settings_of):
    if not RUOZHIBA.is_file():
        pytest.skip(f"{RUOZHIBA} is not on this machine")
    rows = json.loads(RUOZHIBA.read_text(encoding="utf-8"))
    data = settings_of("dataset=ruozhiba").dataset
    template = choose_template(data, Shape.instruction, tokenizer)
    rendered = [render_row(row, data, Shape.instruction, template, tokenizer) for row in rows]
    entries = list(encode(rendered, tokenizer, {tokenizer.eos_token_id}))
    assert len(entries) == len(rows) > 1000
    for row, entry in zip(rows, entries, strict=True):
        wanted = notebook_text(row["instruction"], row["output"], tokenizer.eos_token)
        assert tokenizer.decode(entry["input_ids"]) == wanted
        assert entry["input_ids"] == tokenizer(wanted, add_special_tokens=False)["input_ids"]
        learnt = row["output"] + tokenizer.eos_token
        # A few answers start with a line break, which makes one token with the template's own.
        assert learnt_parts(entry, tokenizer) == ["\n" + learnt if entry["boundary_merge"] else learnt]
        assert not entry["boundary_merge"] or row["output"].startswith("\n")


@pytest.mark.parametrize(
    "answer", ["能，人本来就只有一个心脏。", "😀👍🏽", "{output}", "{x", "}}", "a\nb", "### Response:\n", "7"]
)
@pytest.mark.parametrize("question", ["Q?", "{output}", "", "能，人本来就只有一个心脏。", " x ", "### Response:\na"])
def test_alpaca_learns_the_answer_and_its_end_mark_only(tokenizer, question, answer):
    values = {"instruction": question, "input": "", "output": answer}
    entry = encode_one(render_text(ALPACA, values), tokenizer)
    assert learnt_parts(entry, tokenizer) == [answer + tokenizer.eos_token]
    assert entry["input_ids"][-1] == entry["labels"][-1] == tokenizer.eos_token_id
    before = tokenizer.decode(entry["input_ids"][: entry["prompt_length"]])
    assert before == ALPACA.replace("{instruction}", question, 1).replace("{input}", "")[: -len("{output}")]


def test_text_after_the_answer_is_learnt_with_it(tokenizer):
    entry = encode_one(render_text("Q: {instruction}\n<a>{output}</a>", {"instruction": "q", "output": "x"}), tokenizer)
    assert learnt_parts(entry, tokenizer) == ["x</a><|im_end|>"]


def test_an_answer_that_brings_its_end_mark_gets_no_second_one(tokenizer):
    entry = encode_one(render_text(ALPACA, {"instruction": "q", "output": "x<|im_end|>"}), tokenizer)
    assert entry["input_ids"].count(tokenizer.eos_token_id) == 1


def test_blank_answers_teach_nothing(tokenizer):
    for answer in ("", " ", "\n"):
        entry = encode_one(render_text(ALPACA, {"instruction": "q", "output": answer}), tokenizer)
        assert set(entry["labels"]) == {IGNORED}
        assert learnt_parts(chat([Turn("user", "q"), Turn("assistant", answer)], tokenizer)[0], tokenizer) == []


def test_a_typed_backslash_n_is_a_line_break_in_a_template(tokenizer):
    data = DatasetSettings(template="Q: {instruction}\\nA:\\n{output}")
    assert choose_template(data, Shape.instruction, tokenizer) == "Q: {instruction}\nA:\n{output}"
    rendered = render_row(
        {"instruction": r"a\nb", "output": r"c\nd"}, data, Shape.instruction, "{instruction}|{output}", tokenizer
    )
    assert rendered.text == r"a\nb|c\nd", "cells stay as they are"


def test_cells_of_every_kind_become_text(tokenizer):
    data = DatasetSettings()
    row = {"instruction": 2.0, "input": None, "output": 0, "extra": {"a": ["é", None]}, "flag": True}
    template = "{instruction}|{input}|{extra}|{flag}|{output}"
    rendered = render_row(row, data, Shape.instruction, template, tokenizer)
    assert rendered.text == '2.0||{"a": ["é", null]}|true|0' and rendered.reference == "0"


def test_dates_in_unused_columns_do_no_harm(tokenizer):
    import datetime

    row = {"instruction": "q", "output": "x", "when": datetime.datetime(2024, 1, 2), "raw": b"\x00"}
    assert render_row(row, DatasetSettings(), Shape.instruction, "{instruction}\n{output}", tokenizer).text == "q\nx"


def test_question_and_reference_are_what_people_wrote(tokenizer):
    data = DatasetSettings()
    row = {"instruction": "Do it", "input": "with this", "output": "done"}
    for template in (ALPACA, "chat"):
        rendered = render_row(row, data, Shape.instruction, template, tokenizer)
        assert (rendered.question, rendered.reference) == ("Do it\n\nwith this", "done")
    rendered = render_row(
        {"prompt": "p", "completion": "c"}, data, Shape.prompt_completion, "{prompt}\n{completion}", tokenizer
    )
    assert (rendered.question, rendered.reference) == ("p", "c")


def test_a_text_is_learnt_whole(tokenizer):
    rendered = render_row({"text": "Once 从前"}, DatasetSettings(), Shape.text, "plain", tokenizer)
    entry = encode_one(rendered, tokenizer)
    assert entry["labels"] == entry["input_ids"] and tokenizer.decode(entry["input_ids"]) == "Once 从前<|im_end|>"
    assert render_row({"text": " \n"}, DatasetSettings(), Shape.text, "plain", tokenizer).spans == []
    assert render_row({"text": 0}, DatasetSettings(), Shape.text, "plain", tokenizer).text == "0"


def test_a_token_that_joins_prompt_and_answer_is_learnt_and_reported(tokenizer):
    values = {"instruction": "q", "output": "yes"}
    joined = encode_one(render_text("{instruction} A: {output}", values), tokenizer)
    assert joined["boundary_merge"] and learnt_parts(joined, tokenizer) == [" yes<|im_end|>"]
    apart = encode_one(render_text("{instruction} A:\n{output}", values), tokenizer)
    assert not apart["boundary_merge"] and learnt_parts(apart, tokenizer) == ["yes<|im_end|>"]


# -------------------------------------------------------------------------------------------------- BOS and EOS


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_bos_exactly_once(make_tokenizer, adds_bos, writes_bos):
    template = ("{{ bos_token }}" if writes_bos else "") + CHATML
    tokenizer = make_tokenizer(template, bos="<s>", adds_bos=adds_bos, eos="<|im_end|>")
    entry, parts = chat(CONVERSATION, tokenizer)
    assert entry["input_ids"].count(tokenizer.bos_token_id) == int(adds_bos or writes_bos)
    assert (entry["input_ids"][0] == tokenizer.bos_token_id) == (adds_bos or writes_bos)
    assert tokenizer.bos_token_id not in entry["labels"]
    assert parts == ["First.<|im_end|>", "Second.<|im_end|>"]
    if writes_bos:  # the very tokens that transformers makes of the template
        messages = [{"role": t.role, "content": t.content} for t in CONVERSATION]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert entry["input_ids"] == ids[:-1], "all but the line break after the last end mark"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_of_string_templates_is_the_tokenizers_choice(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(bos="<s>", adds_bos=adds_bos)
    text = notebook_text("q", "x", "")
    entry = encode_one(render_text(ALPACA, {"input": "q", "output": "x"}), tokenizer)
    assert entry["input_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    twice = encode_one(render_text("<s>{input}\n{output}", {"input": "q", "output": "x"}), tokenizer)
    assert twice["input_ids"].count(tokenizer.bos_token_id) == 1 and twice["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, QWEN3, MISTRAL, OPEN_ENDED])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_an_end_mark_is_learnt_and_stands_last(make_tokenizer, template, adds_bos):
    tokenizer = make_tokenizer(template, bos="<s>", adds_bos=adds_bos, special=("<|eot_id|>", "<end_of_turn>"))
    stop_ids = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<end_of_turn>"])}
    entry, _ = chat(CONVERSATION, tokenizer, stop_ids)
    assert entry["input_ids"][-1] == entry["labels"][-1] and entry["labels"][-1] in stop_ids


def test_the_end_mark_is_learnt_where_padding_is_the_same_token(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [chat(turns, tokenizer)[0] for turns in (CONVERSATION, CONVERSATION[:2])]
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(
        [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    )
    for row, labels, attention in zip(rows, batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True):
        length = len(row["input_ids"])
        assert labels[:length] == row["labels"] and labels[length - 1] == tokenizer.eos_token_id
        assert set(labels[length:]) <= {IGNORED} and attention == [1] * length + [0] * (len(labels) - length)


# ------------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize(
    "answers", [("a", "a"), ("user", "assistant"), ("two?", "one?"), ("same", "same"), ("im_start", "\n.")]
)
def test_each_answer_is_learnt_and_no_question(tokenizer, answers):
    turns = [
        Turn("user", "same two? a"),
        Turn("assistant", answers[0]),
        Turn("user", answers[1]),
        Turn("assistant", answers[1]),
    ]
    entry, parts = chat(turns, tokenizer)
    assert parts == [answer + "<|im_end|>" for answer in answers]
    assert tokenizer.decode(entry["input_ids"][: entry["prompt_length"]]).endswith("<|im_start|>assistant\n")


CONTENTS = [
    "plain", " leading", "trailing ", "\n\nboth\n\n", "中文，标点。", "😀👍🏽 e\u0301", "{output} {{x}} {% if %}",
    "<|im_start|>user\nhi",
    "<think>", "[INST] x [/INST]", "\ue0000\ue001", '{"a": [1, null]}', "assistant", "\t", "x" * 5000, "a\u2028b",
]  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, OPEN_ENDED])
def test_odd_contents_are_marked_where_they_stand(make_tokenizer, template, content):
    tokenizer = make_tokenizer(template, bos="<s>", special=("<|eot_id|>", "<end_of_turn>"))
    rendered = render_chat(
        [Turn("user", content), Turn("assistant", f"{content}!"), Turn("user", "q"), Turn("assistant", "z")], tokenizer
    )
    first, last = (rendered.text[a:b] for a, b in rendered.spans)
    written = f"{content}!" if template in (CHATML, OPEN_ENDED) else f"{content}!".strip()
    assert first.lstrip(" ").startswith(written.lstrip(" ")) and len(first) <= len(written) + len("<end_of_turn>") + 1
    assert last.strip().startswith("z") and rendered.text[: rendered.spans[0][0]].count(content.strip()) >= 1


@pytest.mark.parametrize(
    ("template", "end", "lead"),
    [(LLAMA3, "<|eot_id|>", ""), (GEMMA, "<end_of_turn>", ""), (MISTRAL, "<|im_end|>", " "), (CHATML, "<|im_end|>", "")],
)
def test_families_close_every_answer_with_their_own_mark(make_tokenizer, template, end, lead):
    tokenizer = make_tokenizer(template, bos="<s>", adds_bos=True, special=("<|eot_id|>", "<end_of_turn>"))
    _, parts = chat(CONVERSATION, tokenizer, {tokenizer.convert_tokens_to_ids(end)})
    assert [part.removeprefix(lead) for part in parts] == ["First." + end, "Second." + end]


def test_qwen3_learns_its_empty_think_block_before_the_last_answer(make_tokenizer):
    entry, parts = chat(CONVERSATION, tokenizer := make_tokenizer(QWEN3))
    assert parts == ["First.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"]
    assert tokenizer.decode(entry["input_ids"][: entry["prompt_length"]]).endswith("<|im_start|>assistant\n")


def test_qwen3_learns_the_last_answer_with_its_thoughts_and_reads_those_that_lost_theirs(make_tokenizer):
    turns = [Turn(t.role, t.content) for t in CONVERSATION]
    turns[1].content, turns[3].content = "<think>\nhm\n</think>\n\nFirst.", "<think>\nwell\n</think>\n\nSecond."
    _, parts = chat(turns, make_tokenizer(QWEN3))
    assert parts == ["<think>\nwell\n</think>\n\nSecond.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, OPEN_ENDED, MISTRAL])
def test_thoughts_are_learnt_by_templates_that_do_not_know_them(make_tokenizer, template):
    turns = [Turn("user", "q"), Turn("assistant", "<think>\nhm\n</think>\n\nx")]
    _, parts = chat(turns, make_tokenizer(template, bos="<s>"))
    assert [part.strip() for part in parts] == ["<think>\nhm\n</think>\n\nx<|im_end|>"]


def test_what_opens_the_next_turn_is_no_end_mark(make_tokenizer):
    """A template without end marks: nothing is learnt between the turns, and EOS follows the last answer."""
    _, parts = chat(CONVERSATION, make_tokenizer(OPEN_ENDED))
    assert parts == ["First.", "Second.<|im_end|>"]


def test_a_system_prompt_that_the_template_moves_is_found(make_tokenizer):
    tokenizer = make_tokenizer(MISTRAL, bos="<s>")
    entry, parts = chat([Turn("system", "Be brief."), *CONVERSATION], tokenizer)
    assert parts == [" First.<|im_end|>", " Second.<|im_end|>"]
    assert "[INST] Be brief.\n\ntwo? [/INST]" in tokenizer.decode(entry["input_ids"])


@pytest.mark.parametrize("template", [GEMMA, FORGETFUL], ids=["raises", "leaves it out"])
def test_a_system_prompt_without_a_place_is_refused_with_the_way_out(make_tokenizer, template):
    tokenizer = make_tokenizer(template, bos="<s>")
    with pytest.raises(Refusal) as refusal:
        render_chat([Turn("system", "Be brief."), *CONVERSATION], tokenizer)
    assert "system" in str(refusal.value) and "model.chat_template=chatml" in str(refusal.value)
    row = {"instruction": "q", "output": "a"}
    for settings, cells, way in (
        ({"system_prompt": "s"}, {}, "dataset.system_prompt=null   trains without it"),
        ({}, {"system": "s"}, "dataset.columns.system=null dataset.ignore_columns=[system]   trains without it"),
    ):
        with pytest.raises(Refusal) as refusal:
            render_row(row | cells, DatasetSettings(**settings), Shape.instruction, "chat", tokenizer)
        assert refusal.value.problems[0].fix.startswith(way)


def test_other_refusals_of_a_template_are_passed_on(make_tokenizer):
    template = "{{ raise_exception('Roles must alternate') if messages | length > 2 }}" + CHATML
    with pytest.raises(Refusal, match="Roles must alternate"):
        render_chat(CONVERSATION, make_tokenizer(template))


def test_a_template_that_changes_words_is_refused(make_tokenizer):
    with pytest.raises(Refusal, match="changes or leaves out what a turn says"):
        render_chat(CONVERSATION, make_tokenizer(CHATML.replace("message['content']", "message['content'] | upper")))


def test_a_question_without_an_answer_ends_the_row_at_the_answer_before_it(tokenizer):
    whole, _ = chat(CONVERSATION[:2], tokenizer)
    entry, parts = chat(CONVERSATION[:3], tokenizer)
    assert parts == ["First.<|im_end|>"] and entry["input_ids"] == whole["input_ids"]
    assert (entry["question"], entry["reference"]) == ("one?", "First.")


def test_an_empty_answer_is_not_learnt_and_the_others_are(tokenizer):
    turns = [Turn(t.role, t.content) for t in CONVERSATION]
    turns[1].content = ""
    assert chat(turns, tokenizer)[1] == ["Second.<|im_end|>"]
    turns[1].content, turns[3].content = "First.", " "
    entry, parts = chat(turns, tokenizer)
    assert parts == ["First.<|im_end|>"] and (entry["question"], entry["reference"]) == ("one?", "First.")


def test_tool_turns_are_read_and_not_learnt(tokenizer):
    turns = [Turn("user", "2+2?"), Turn("assistant", "calc(2+2)"), Turn("tool", "4"), Turn("assistant", "It is 4.")]
    assert chat(turns, tokenizer)[1] == ["calc(2+2)<|im_end|>", "It is 4.<|im_end|>"]


def test_another_chat_template_on_the_same_tokenizer_is_noticed(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, bos="<nobody else's>")
    assert chat(CONVERSATION, tokenizer)[1][0] == "First.<|im_end|>"
    tokenizer.chat_template = QWEN3
    assert chat(CONVERSATION, tokenizer)[1][1].startswith("<think>")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "not json"}, "as JSON it has the fault"),
        ({"messages": []}, "a list of turns"),
        ({"messages": None}, "a list of turns"),
        ({"messages": ["hi"]}, "turn 1 in column 'messages' is 'hi'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown speaker 'robot'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "a form that is not known"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
    ],
)
def test_turns_that_cannot_be_read_say_why(row, words):
    with pytest.raises(ValueError, match=words):
        row_to_turns(row, DatasetSettings(), Shape.messages)


def test_turns_are_read_in_all_their_spellings():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]
    wanted = [Turn("user", "q"), Turn("assistant", "x")]
    data = DatasetSettings()
    assert row_to_turns({"conversations": turns}, data, Shape.conversations) == wanted
    assert row_to_turns({"conversations": json.dumps(turns)}, data, Shape.conversations) == wanted
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "x", "tool_calls": None},
    ]
    assert row_to_turns({"messages": parts}, data, Shape.messages) == wanted
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "x"}]}
    assert row_to_turns(row, data, Shape.prompt_completion) == wanted
    assert row_to_turns(row | {"completion": "x"}, data, Shape.prompt_completion) == wanted


def test_system_prompts_of_rows_go_before_the_settings_own():
    data = DatasetSettings(system_prompt="ours")
    row = {"instruction": "q", "output": "x"}
    assert row_to_turns(row, data, Shape.instruction)[0] == Turn("system", "ours")
    assert row_to_turns(row | {"system": "its"}, data, Shape.instruction)[0] == Turn("system", "its")
    messages = [{"role": "system", "content": "turn's"}, {"role": "user", "content": "q"}]
    assert [t.content for t in row_to_turns({"messages": messages}, data, Shape.messages)] == ["turn's", "q"]


# ------------------------------------------------------------------------- what is learnt from is what is asked


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("question", ["Why?", "为什么？😀", " spaces ", "{output}", "5"])
@pytest.mark.parametrize(
    ("template", "shape", "columns"),
    [
        ("alpaca", Shape.instruction, ColumnSettings()),
        ("alpaca", Shape.instruction, ColumnSettings(instruction=None, input="instruction")),
        ("Q: {instruction}\nA:\n{output}", Shape.instruction, ColumnSettings()),
        ("Q: {instruction} A: {output}", Shape.instruction, ColumnSettings()),
        ("Q: {question}\nA:\n{output}", Shape.instruction, ColumnSettings(instruction="question")),
        ("plain", Shape.prompt_completion, ColumnSettings()),
        ("chat", Shape.instruction, ColumnSettings()),
        ("chat", Shape.prompt_completion, ColumnSettings(prompt="ask", completion="say")),
        ("chat", Shape.messages, ColumnSettings()),
        ("chat", Shape.conversations, ColumnSettings()),
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_question_of_ones_own_is_asked_as_the_rows_ask_theirs(
    make_tokenizer, template, shape, columns, question, system, adds_bos
):
    tokenizer = make_tokenizer(QWEN3, bos="<s>", adds_bos=adds_bos)
    settings = Settings(dataset=DatasetSettings(template=template, columns=columns, system_prompt=system))
    row = {
        Shape.instruction: {columns.instruction or columns.input: question, "output": "answer", "extra": "e"},
        Shape.prompt_completion: {columns.prompt: question, columns.completion: "answer"},
        Shape.messages: {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "answer"}]},
        Shape.conversations: {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "answer"}]},
    }[shape]
    chosen = choose_template(settings.dataset, shape, tokenizer)
    entry = encode_one(render_row(row, settings.dataset, shape, chosen, tokenizer), tokenizer)
    ids = prompt_ids(question, settings, shape, tokenizer)
    assert ids == entry["input_ids"][: entry["prompt_length"]]
    if template == "chat":  # and what a server sends to the model
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == [tokenizer.bos_token_id] * adds_bos + asked


def test_a_text_is_asked_to_go_on_from_the_question(tokenizer):
    ids = prompt_ids("Once", Settings(), Shape.text, tokenizer)
    assert tokenizer.decode(ids) == "Once"


@pytest.mark.parametrize(
    ("template", "shape", "chat_template", "words"),
    [
        ("chat", Shape.instruction, None, "model.chat_template=chatml"),
        ("plain", Shape.messages, CHATML, "dataset.template=chat"),
        ("chat", Shape.text, CHATML, "dataset.template=plain"),
        ("auto", Shape.messages, None, "model.chat_template=chatml"),
    ],
)
def test_templates_that_do_not_go_with_the_rows_are_refused(make_tokenizer, template, shape, chat_template, words):
    with pytest.raises(Refusal, match=words.replace(".", r"\.")):
        choose_template(DatasetSettings(template=template), shape, make_tokenizer(chat_template))


# ------------------------------------------------------------------------------------------------- the property

WORDS = st.one_of(
    st.text(string.printable, min_size=0, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["user", "assistant", "a", "<|im_end|>", "<|im_start|>assistant\n", "\ue0001\ue001", "\n", " x ", "{output}"]
    ),
)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3])
@example(contents=[("", "\n0"), ("", "")])
@hypothesis_settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(contents=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_what_is_learnt_is_the_answers_and_their_end_marks(make_tokenizer, template, contents):
    tokenizer = make_tokenizer(template, bos="<s>", special=("<|eot_id|>",))
    for text in {text for pair in contents for text in pair}:  # GPT-2's bytes do not reach the planes that are not assigned
        assume(tokenizer.decode(tokenizer(text)["input_ids"]) == text)
    turns = [Turn(role, text) for pair in contents for role, text in zip(("user", "assistant"), pair, strict=True)]
    rendered = render_chat(turns, tokenizer)
    entry = encode_one(rendered, tokenizer, {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|eot_id|>"])})
    end = "<|eot_id|>" if template == LLAMA3 else "<|im_end|>"
    wanted = [(answer.strip() if template == LLAMA3 else answer) + end for _, answer in contents if answer.strip()]
    if template == QWEN3 and contents[-1][1].strip():
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1].lstrip("\n")
    assert [rendered.text[a:b] for a, b in rendered.spans] == wanted
    learnt = [i for i in entry["labels"] if i != IGNORED]
    # An answer that starts with a line break may make one token with the template's own.
    merged = "\n?" if entry["boundary_merge"] else ""
    pattern = "".join((merged if part[0].isspace() else "") + re.escape(part) for part in wanted)
    assert re.fullmatch(pattern, tokenizer.decode(learnt))
