"""Rows of `method=grpo`: the tokens that SFT has before its last answer, the reference answer, and the raw row for rewards."""

import json
import re

import pytest

from sft.config.schema import Shape
from sft.data.prepare import prepare
from sft.errors import Refusal
from sft.model.chat_template import CHATML
from tests.conftest import make_settings
from tests.data.miniatures import REASONING, assistant, user

INSTRUCTION = [{"instruction": f"What is {i} + 1?", "output": f"It is {i + 1}."} for i in range(4)]
CHINESE = [{"instruction": f"{i} 加 1 等于多少？", "input": "只写数字", "output": f"{i + 1}。"} for i in range(4)]
MESSAGES = [
    {"messages": [user(f"Hello {i}"), assistant("Hi."), user("And now?"), assistant(f"Goodbye {i}.")]} for i in range(4)
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}"}]} for i in range(4)
]  # fmt: skip
GSM8K = [{"question": f"Q{i}?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(4)]
PAIRS = [{"prompt": f"Say {i}", "completion": f"{i}"} for i in range(4)]

GSM8K_COLUMNS = ("dataset.columns.instruction=question", "dataset.columns.output=answer")


def write(folder, rows: list[dict]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return f"dataset.path={file}"


def prepared(method: str, rows: list[dict], tmp_path, loaded_tokenizer, *overrides: str):
    words = ["method.reward_funcs=[ends]"] if method == "grpo" else []
    place = (write(tmp_path, rows), "dataset.eval_fraction=0", "dataset.shuffle=false")
    return prepare(make_settings(f"method={method}", *words, *place, *overrides), *loaded_tokenizer)


def refusal_of(rows: list[dict], tmp_path, loaded_tokenizer, *overrides: str):
    with pytest.raises(Refusal) as caught:
        prepared("grpo", rows, tmp_path, loaded_tokenizer, *overrides)
    (problem,) = caught.value.problems
    return problem


OF_SHAPES = {
    "instruction": (INSTRUCTION, ()), "chinese": (CHINESE, ()), "messages": (MESSAGES, ()), "sharegpt": (SHAREGPT, ()),
    "gsm8k": (GSM8K, GSM8K_COLUMNS), "prompt_completion": (PAIRS, ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "template"),
    [(shape, "chat") for shape in OF_SHAPES] + [(shape, "alpaca") for shape in OF_SHAPES if shape != "messages"],
)  # a template text takes one question, and these have several
def test_the_prompt_is_what_sft_has_before_its_last_answer(shape, template, tmp_path, loaded_tokenizer):
    rows, words = OF_SHAPES[shape]
    words = (*words, f"dataset.template={template}")
    sft = prepared("sft", rows, tmp_path, loaded_tokenizer, *words).train
    grpo = prepared("grpo", rows, tmp_path, loaded_tokenizer, *words).train
    assert len(grpo) == len(sft) == 4
    for ours, theirs in zip(grpo, sft, strict=True):
        assert ours["input_ids"] == theirs["input_ids"][: theirs["prompt_length"]]
        assert ours["prompt_length"] == len(ours["input_ids"]) == theirs["prompt_length"]
        assert (ours["question"], ours["reference"], ours["row"]) == (theirs["question"], theirs["reference"], theirs["row"])
        assert json.loads(ours["columns"]) == rows[ours["row"] - 1]
        assert "labels" not in ours


def test_a_prompt_ends_where_the_model_is_to_speak(tmp_path, loaded_tokenizer):
    tokenizer = loaded_tokenizer[0]
    (row, *_) = prepared("grpo", MESSAGES, tmp_path, loaded_tokenizer).train
    turns = MESSAGES[0]["messages"][:-1]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert row["reference"] == "Goodbye 0."


@pytest.mark.parametrize("question", ["instruction", "prompt"])
def test_prompts_alone_have_no_reference(question, tmp_path, loaded_tokenizer):
    rows = [{question: f"Say {i}", "level": i} for i in range(4)]
    answered = [{question: f"Say {i}", "output" if question == "instruction" else "completion": "x"} for i in range(4)]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer)
    whole = prepared("grpo", answered, tmp_path, loaded_tokenizer)
    assert found.train["reference"][:] == [""] * 4 and found.facts["prompts"]["references"] == 0
    assert found.train["input_ids"][:] == whole.train["input_ids"][:]
    assert json.loads(found.train[3]["columns"]) == rows[3]


@pytest.mark.parametrize("question", ["instruction", "prompt"])
def test_the_column_answer_is_the_reference_of_rows_without_one_to_learn(question, tmp_path, loaded_tokenizer):
    rows = [{question: f"What is {i} + 1?", "answer": i + 1} for i in range(4)]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer)
    assert found.train["reference"][:] == ["1", "2", "3", "4"] and found.facts["prompts"]["references"] == 4


def test_another_column_can_hold_the_answers(tmp_path, loaded_tokenizer):
    rows = [{"prompt": [user(f"What is {i} + 1?")], "solution": f"{i + 1}"} for i in range(4)]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer, "dataset.columns.answer=solution")
    assert found.train["reference"][:] == ["1", "2", "3", "4"]


def test_a_conversation_that_ends_with_a_question_is_a_prompt_as_a_whole(tmp_path, loaded_tokenizer):
    tokenizer = loaded_tokenizer[0]
    rows = [{"messages": [user("Hi"), assistant("Hello."), user(f"What is {i} + 1?")], "answer": f"{i + 1}"} for i in range(4)]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer)
    text = tokenizer.apply_chat_template(rows[2]["messages"], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found.train[2]["input_ids"]) == text
    assert (found.train[2]["question"], found.train[2]["reference"]) == ("What is 2 + 1?", "3")


def test_a_conversation_as_json_text_can_end_with_a_question(tmp_path, loaded_tokenizer):
    rows = [{"messages": json.dumps([user(f"What is {i} + 1?")])} for i in range(4)]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer)
    assert found.train["question"][:] == [f"What is {i} + 1?" for i in range(4)]


def test_a_blank_answer_is_a_prompt_alone(tmp_path, loaded_tokenizer):
    rows = [*INSTRUCTION[:3], {"instruction": "What is 9 + 1?", "output": ""}]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer)
    assert len(found.train) == 4 and found.train["reference"][3] == ""


def test_what_was_thought_before_an_answer_is_no_part_of_the_prompt(tmp_path, loaded_tokenizer):
    rows = [{**row, "reasoning_content": "Count on."} for row in INSTRUCTION]
    plain = prepared("grpo", INSTRUCTION, tmp_path, loaded_tokenizer)
    assert prepared("grpo", rows, tmp_path, loaded_tokenizer).train["input_ids"][:] == plain.train["input_ids"][:]


def test_rows_of_weight_0_are_left_out_and_told(tmp_path, loaded_tokenizer):
    rows = [{**row, "weight": int(i > 0)} for i, row in enumerate(INSTRUCTION)]
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer)
    assert found.train["row"][:] == [2, 3, 4]
    assert any("1 rows have the weight 0" in warning for warning in found.facts["warnings"])


def test_a_prompt_without_room_for_its_completion_is_refused_with_what_has_room(tmp_path, loaded_tokenizer):
    rows = [*INSTRUCTION, {"instruction": "word " * 60, "output": "x"}]
    words = ("model.max_seq_length=128", "method.max_completion_length=64")
    problem = refusal_of(rows, tmp_path, loaded_tokenizer, *words)
    assert "1 of 5 train rows have a prompt that leaves no room" in problem.why
    first, second, third = problem.fix.splitlines()
    assert third.startswith("dataset.overlong=drop")
    for fix in (first, second):
        again = [word for word in words if word.partition("=")[0] not in fix]
        assert len(prepared("grpo", rows, tmp_path, loaded_tokenizer, *again, fix).train) == 5


def test_a_prompt_without_room_is_dropped_and_told(tmp_path, loaded_tokenizer):
    rows = [*INSTRUCTION, {"instruction": "word " * 60, "output": "x"}]
    words = ("model.max_seq_length=128", "method.max_completion_length=64", "dataset.overlong=drop")
    found = prepared("grpo", rows, tmp_path, loaded_tokenizer, *words)
    assert found.train["row"][:] == [1, 2, 3, 4] and found.facts["dropped_rows"] == 1
    assert any("1 rows were left out: their prompt" in warning for warning in found.facts["warnings"])


def test_prompts_none_of_which_has_room_are_refused(tmp_path, loaded_tokenizer):
    words = ("model.max_seq_length=64", "method.max_completion_length=60", "dataset.overlong=drop")
    problem = refusal_of(INSTRUCTION, tmp_path, loaded_tokenizer, *words)
    assert "None of the rows to train on leaves room" in problem.why and problem.fix == "model.max_seq_length=128"


def test_held_out_prompts_that_are_trained_on_are_told_whatever_their_answers(tmp_path, loaded_tokenizer):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({**INSTRUCTION[2], "output": "Another answer."}) + "\n", encoding="utf-8")
    found = prepared("grpo", INSTRUCTION, tmp_path, loaded_tokenizer, f"dataset.eval_path={held_out}")
    assert found.facts["duplicates"] == {"held_out": 1, "train": 0, "rows": [[1, 3]]}
    assert any("1 held-out prompts are trained on as well" in warning for warning in found.facts["warnings"])


def test_the_same_prompt_twice_is_counted(tmp_path, loaded_tokenizer):
    found = prepared("grpo", [*INSTRUCTION, INSTRUCTION[0]], tmp_path, loaded_tokenizer)
    assert found.facts["duplicates"]["train"] == 1


def test_a_template_without_a_generation_prompt_is_told(tmp_path, make_tokenizer, loaded_tokenizer):
    mute = make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}")
    found = prepared("grpo", INSTRUCTION, tmp_path, (mute, loaded_tokenizer[1]))
    assert any("adds nothing where the model is to speak" in warning for warning in found.facts["warnings"])
    assert mute.decode(found.train[0]["input_ids"]) == "user: What is 0 + 1?<|im_end|>assistant:"


def test_rows_without_a_prompt_are_refused_with_the_column_that_may_hold_one(tmp_path, loaded_tokenizer):
    problem = refusal_of([{"question": f"Q{i}", "answer": "A"} for i in range(4)], tmp_path, loaded_tokenizer)
    assert problem.fix == "dataset.columns.instruction=question dataset.columns.output=answer"
    problem = refusal_of([{"question": f"Q{i}"} for i in range(4)], tmp_path, loaded_tokenizer)
    assert problem.fix == "dataset.columns.instruction=question"


@pytest.mark.parametrize("role", ["answer", "output"])
def test_a_column_of_answers_that_was_named_and_is_missing_is_refused(role, tmp_path, loaded_tokenizer):
    rows = [{"instruction": f"Q{i}", "solution": "A"} for i in range(4)]
    problem = refusal_of(rows, tmp_path, loaded_tokenizer, f"dataset.columns.{role}=solutions")
    assert problem.what == f"dataset.columns.{role}=solutions" and problem.fix == f"dataset.columns.{role}=solution"


def test_tokens_of_another_length_of_completions_are_made_anew(tmp_path, loaded_tokenizer):
    rows = [*INSTRUCTION, {"instruction": "word " * 60, "output": "x"}]
    words = ("model.max_seq_length=128", "dataset.overlong=drop")
    counts = [
        len(prepared("grpo", rows, tmp_path, loaded_tokenizer, *words, f"method.max_completion_length={room}").train)
        for room in (64, 8)
    ]
    assert counts == [4, 5]


def test_the_shipped_sums_are_prompts_with_their_answers(loaded_tokenizer):
    found = prepare(make_settings("method=grpo"), *loaded_tokenizer)
    assert (len(found.train), len(found.eval), found.facts["shape"]) == (360, 40, Shape.instruction.value)
    assert found.facts["warnings"] == [] and found.facts["notes"] == {}
    for row in found.train.select(range(20)):
        first, second = map(int, re.findall(r"\d+", row["question"]))
        assert row["reference"] == str(first + second)


def test_a_token_that_joins_prompt_and_answer_is_told(tmp_path, loaded_tokenizer):
    words = ("dataset.template='Q: {instruction} A: {output}'",)
    found = prepared("grpo", INSTRUCTION, tmp_path, loaded_tokenizer, *words)
    assert any("In 4 rows a token joins the prompt to the answer" in warning for warning in found.facts["warnings"])


@pytest.mark.parametrize("answer", ["22", "<think>\nSeven more than 15.\n</think>\n\n22", None])
def test_a_reasoning_model_is_asked_as_it_is_when_it_is_served(answer, tmp_path, make_tokenizer, loaded_tokenizer):
    thinking = make_tokenizer(REASONING)
    question = [user("Hi"), assistant("<think>\nHow nice.\n</think>\n\nHello."), user("What is 7 + 15?")]
    rows = [{"messages": [*question, assistant(answer)] if answer else question}] * 2
    row = prepared("grpo", rows, tmp_path, (thinking, loaded_tokenizer[1])).train[0]
    text = thinking.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert (thinking.decode(row["input_ids"]), row["reference"]) == (text, answer or "")


def test_a_conversation_that_ends_with_the_result_of_a_tool_is_a_prompt_as_a_whole(tmp_path, make_tokenizer, loaded_tokenizer):
    chatml = make_tokenizer(CHATML)
    turns = [user("How warm is it?"), assistant("I look."), {"role": "tool", "content": "21 degrees"}]
    row = prepared("grpo", [{"messages": turns}] * 2, tmp_path, (chatml, loaded_tokenizer[1])).train[0]
    assert chatml.decode(row["input_ids"]) == chatml.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
