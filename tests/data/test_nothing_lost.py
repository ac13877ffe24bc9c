"""What a row says and what is learnt of it: keys, columns and cells that were once lost, and tokens that were not the text."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from sft.config.schema import DatasetSettings, LossOn, ModelSettings, Shape
from sft.data.cells import as_text
from sft.data.templates import render_row
from sft.data.tokenize import IGNORED, encode
from sft.model import builtin
from sft.model.chat_template import CHATML
from sft.model.tokenizer import load_tokenizer
from sft.plan.plan import Plan
from sft.preflight.checks import examine
from tests.conftest import USERS_CACHE
from tests.data.miniatures import PLAIN_MARKS, REASONING, TOOL, assistant, refusal_of, user


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------- keys and columns


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_key_of_its_own_is_learnt(learn, key):
    row = {"messages": [user("2+2?"), assistant("4", **{key: "Add 2 and 2."})]}
    assert learn(row)[1] == ["<think>\nAdd 2 and 2.\n</think>\n\n4<|im_end|>"]


def test_a_template_without_a_place_for_reasoning_refuses_such_rows_with_their_count(run):
    rows = [{"messages": [user(f"{n}+2?"), assistant("4", reasoning_content="Add.")]} for n in range(5)]
    text = refusal_of(run, [*rows, {"messages": [user("q"), assistant("a")]}], CHATML)
    assert "rows 1, 2 and 3 of the data (5 of 6 rows): a row with reasoning in a key of its own" in text
    assert "1 problem;" in text


def test_an_earlier_answer_that_loses_its_reasoning_is_read_and_counted(learn, run):
    turns = [user("2+2?"), assistant("<think>\nAdd two and two.\n</think>\n\n4"), user("And 3+3?"),
             assistant("<think>\nThree plus 3.\n</think>\n\n6")]  # fmt: skip
    text, learnt, _ = learn({"messages": turns})
    assert "4<|im_end|>" in text and learnt == ["<think>\nThree plus 3.\n</think>\n\n6<|im_end|>"]
    warnings = run([{"messages": turns}] * 2).facts["warnings"]
    assert any("2 answers are read and not trained on" in warning for warning in warnings)


def test_an_earlier_answer_without_reasoning_is_learnt(learn):
    turns = [user("a?"), assistant("<think>\n\n</think>\n\nA."), user("b?"), assistant("B.")]
    assert learn({"messages": turns})[1] == ["A.<|im_end|>", "<think>\n\n</think>\n\nB.<|im_end|>"]


def test_tools_reach_the_template_and_are_not_learnt(learn):
    row = {"messages": [user("Weather in Bern?"), assistant("<tool_call>get_weather</tool_call>")]}
    for tools in ([TOOL], json.dumps([TOOL])):
        text, learnt, notes = learn(row | {"tools": tools})
        assert text.startswith('<|im_start|>system\nTools: [{"type": "function", "function": {"name": "get_weather"')
        assert learnt == ["<think>\n\n</think>\n\n<tool_call>get_weather</tool_call><|im_end|>"] and not notes


def test_tools_without_a_place_are_a_counted_warning(run):
    rows = [{"messages": [user(f"q{n}"), assistant("a")], "tools": [TOOL]} for n in range(3)]
    assert any("3 rows define tools" in warning for warning in run(rows, CHATML).facts["warnings"])
    assert run([{**row, "tools": []} for row in rows], CHATML).facts["warnings"] == []


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_mask", "trainable"])
def test_an_answer_of_weight_0_is_read_and_not_learnt(learn, key):
    for zero, one in ((0, 1), (False, True), (0.0, None)):
        turns = [user("Capital?"), assistant("Lyon", **{key: zero}), user("Sure?"), assistant("Paris.", **{key: one})]
        text, learnt, _ = learn({"messages": turns}, CHATML)
        assert "Lyon<|im_end|>" in text and learnt == ["Paris.<|im_end|>"]


def test_weights_that_cannot_be_followed_are_said(run):
    rows = [{"messages": [user(f"q{n}"), assistant("a", weight=0.5)]} for n in range(2)]
    assert "rows 1 and 2 of the data" in refusal_of(run, rows) and "weight=0.5; a weight can be 0 or 1" in refusal_of(run, rows)
    rows = [{"messages": [user("q"), assistant("a", weight=0), user("q"), assistant("b")]}]
    assert any("1 answers have the weight 0" in warning for warning in run(rows, loss_on=LossOn.all).facts["warnings"])
    rows = [{"messages": [user("q"), assistant("a", weight=0)]}]
    assert "all have the weight 0" in refusal_of(run, rows)


def test_keys_of_turns_that_are_not_used_are_named(run):
    rows = [{"messages": [user("q") | {"weight": 1}, assistant("a", name="Ann", id=None)]}] * 2
    assert any("name (2), weight (2)" in warning for warning in run(rows, CHATML).facts["warnings"])


def test_alpacas_history_comes_first_and_is_read(learn):
    row = {"instruction": "And its river?", "output": "The Seine.", "history": [["Capital of France?", "Paris."]]}
    for history in (row["history"], json.dumps(row["history"])):
        text, learnt, _ = learn(row | {"history": history, "system": "Be terse."}, CHATML, Shape.instruction)
        roles = ["system\nBe terse.", "user\nCapital of France?", "assistant\nParis.", "user\nAnd its river?"]
        assert text.startswith("".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in roles))
        assert learnt == ["The Seine.<|im_end|>"]
    for blank in ([], None, ""):
        assert learn(row | {"history": blank}, CHATML, Shape.instruction)[0].startswith("<|im_start|>user\nAnd its river?")


@pytest.mark.parametrize(("column", "value"), [("history", [["q", "a"]]), ("tools", [TOOL])])
def test_a_template_text_without_a_place_for_a_column_refuses_it(run, column, value):
    rows = [{"instruction": f"q{n}", "output": "a", column: value} for n in range(4)]
    text = refusal_of(run, rows, template="alpaca")
    assert f"(4 of 4 rows): a row with {column}" in text and "hint: dataset.template=chat" in text
    assert len(run(rows, CHATML if column == "history" else REASONING, template="chat").train) == 4


# ------------------------------------------------------------------------------------------- cells that are no text


def test_cells_become_what_they_mean():
    assert as_text(math.nan) == as_text(None) == "" and as_text(b"Hello \xc3\xa9") == "Hello é" and as_text(0) == "0"
    with pytest.raises(ValueError, match="no UTF-8"):
        as_text(b"\xff\xfe\x00")


def test_an_infinite_number_is_refused(run):
    assert "column 'output' holds an infinite number" in refusal_of(run, [{"instruction": "q", "output": math.inf}] * 2)


def test_nan_in_a_file_is_blank(run, tokenizer):
    rows = [{"instruction": "Say hi.", "input": math.nan, "output": "Hi!"}] * 2
    assert {row["question"] for row in run(rows, CHATML).train} == {"Say hi."}
    text = tokenizer.decode(run(rows, template="alpaca").train[0]["input_ids"])
    assert "### Input:\n\n\n### Response:\nHi!" in text


def test_lists_and_objects_as_answers_are_refused_with_their_count(run):
    rows = [{"instruction": f"q{n}", "output": {"a": n}} for n in range(5)]
    assert "(5 of 5 rows)" in refusal_of(run, rows) and "column 'output' holds an object, not text" in refusal_of(run, rows)
    rows = [{"text": ["a", "b"]}]
    assert "column 'text' holds a list, not text" in refusal_of(run, rows)
    rows = [{"messages": [user("q"), {"role": "assistant", "content": {"a": 1}}]}]
    assert "column 'messages' holds an object, not text" in refusal_of(run, rows)


def test_an_answer_that_is_a_list_of_turns_is_hinted_at_as_turns(run):
    turns = [user("Hi?"), assistant("Hello!")]
    rows = [{"prompt": f"Hi {n}?", "chosen": turns, "rejected": [user("Hi?"), assistant("Go.")]} for n in range(2)]
    assert "hint: dataset.columns.messages=chosen" in refusal_of(run, rows)
    columns = {"instruction": "prompt", "output": "chosen"}
    assert "hint: dataset.shape=messages dataset.columns.messages=chosen" in refusal_of(run, rows, columns=columns)
    assert run(rows, columns={"messages": "chosen"}).train[0]["reference"] == "Hello!"


def test_rows_with_several_faults_name_each_fault_once(run):
    rows = [
        {"messages": [{"role": "robot", "content": "q"}]},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "r"}]},
    ]
    text = refusal_of(run, [*rows, {"messages": [user("q"), assistant("a")]}])
    assert "2 problems" in text and "rows 1 and 3 of the data" in text and "row 2 of the data" in text


# ------------------------------------------------------------------------------------------- tokens that are the text


def ids_of(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("answer", ["Done.", "Done!", "Is it?", "ok)", "a <b> c", '{"a": 1}'])
def test_a_learnt_token_holds_nothing_beyond_its_answer(make_tokenizer, answer):
    tokenizer = make_tokenizer(PLAIN_MARKS)
    turns = [user("q"), assistant(answer), user("r"), assistant(answer)]
    rendered = render_row({"messages": turns}, DatasetSettings(), Shape.messages, "chat", tokenizer)
    entry = next(iter(encode([rendered], tokenizer, {tokenizer.eos_token_id})))
    learnt = [label for label in entry["labels"] if label != IGNORED]
    assert learnt == [*ids_of(answer, tokenizer), *ids_of(answer, tokenizer), tokenizer.eos_token_id]
    assert tokenizer.decode(entry["input_ids"]) == rendered.text[: rendered.spans[-1][1]] + tokenizer.eos_token


@pytest.fixture
def model(tmp_path):
    """`model(change)`: a folder of the random model whose tokenizer config went through `change`."""

    def made(change) -> str:
        folder = tmp_path / "model"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SFT_CACHE", str(USERS_CACHE))  # where it was made before, with all its tokens
            shutil.copytree(builtin.local_model(builtin.TINY_RANDOM), folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(change(config)))
        return str(folder)

    return made


def test_a_tokenizer_whose_tokens_do_not_give_the_rows_back_is_refused(model, run):
    rows = [{"instruction": f"Is {n} a number?", "output": f"Yes, number {n} is so.\nIt is."} for n in range(20)]
    folder = model(lambda config: config | {"tokenizer_class": "LlamaTokenizerFast"})
    text = refusal_of(run, rows, tokenizer=load_tokenizer(ModelSettings(name=folder))[0])
    assert "Its tokens do not give the text of the rows back" in text and '"tokenizer_class"' in text


def test_the_refusal_of_such_a_tokenizer_shows_where_the_texts_part(run):
    tokenizer = words_of_numbers()
    known = " ".join(f"w{n}" for n in range(100))
    text = refusal_of(run, [{"instruction": "w1", "output": f"{known} x{n} w7"} for n in range(20)], tokenizer=tokenizer)
    assert " x0 w7' comes back as " in text and "<unk> w7'" in text


@pytest.mark.parametrize("size", [999, 1000, 1001, 1003, 5000])
def test_long_rows_are_compared_up_to_the_end_of_a_word(run, size):
    text = " ".join(f"w{n}" for n in range(1000, 3000))[:size].rpartition(" ")[0]
    rows = [{"instruction": f"w{n}", "output": f"w{'1' * (n % 4 + 1)} {text} w1 w2"} for n in range(20)]
    assert not [line for line in run(rows, tokenizer=words_of_numbers()).facts["warnings"] if "back" in line]


def words_of_numbers():
    """A tokenizer whose tokens are the words w0 to w7999 alone."""
    from benchmarks.families import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def test_the_hint_for_such_a_tokenizer_reads_its_file_as_it_stands(model, run):
    rows = [{"instruction": f"Is {n} a number?", "output": f"Yes, number {n} is so.\nIt is."} for n in range(20)]
    folder = model(lambda config: config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer = load_tokenizer(ModelSettings(name=folder))[0]
    assert run(rows, tokenizer=tokenizer).facts["warnings"] == []
    text = rows[0]["output"]
    assert ids_of(text, tokenizer) == Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids


@pytest.mark.parametrize("text", ["a  b\n\tc ", "é e\u0301 Ａ", "能，人本来 😀👍🏽", " x", "<|im_end|> y"])
def test_texts_that_tokens_do_give_back_are_not_refused(tokenizer, text):
    from sft.data.tokenize import not_restored

    assert not_restored([text], tokenizer) == []


def test_ids_beyond_the_embeddings_are_refused_before_loading(model, small, tmp_path):
    folder = model(lambda config: config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tokenizer.save_pretrained(folder)
    path = tmp_path / "rows.jsonl"

    def look(answer: str):
        path.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"{answer} {n}"}) for n in range(8)))
        overrides = (f"model.name={folder}", "dataset=local", f"dataset.path={path}", "dataset.eval_fraction=0")
        return examine(small("preflight.mode=only", *overrides), tmp_path / "run", Plan(), {})

    (problem,) = look("<|mark|> yes").problems
    assert "of the data: the token '<|mark|>', id 49152" in problem.what and "vocab_size=49152" in problem.why
    found = look("yes")
    assert not found.problems and any("1 tokens that the model has no embedding for" in text for text in found.warnings)


def test_the_last_answer_alone_is_trained_on_where_that_is_asked_for(run, tokenizer):
    turns = [user("1+1?"), assistant("Two."), user("2+2?"), assistant("Four.")]
    prepared = run([{"messages": turns}] * 2, CHATML, loss_on=LossOn.last)
    learnt = [label for label in prepared.train[0]["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == "Four.<|im_end|>"
    assert prepared.train[0]["prompt_length"] == len(prepared.train[0]["input_ids"]) - len(learnt)
