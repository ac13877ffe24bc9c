"""From a file to tokens: what is left out, what is counted, and when the cache is used."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from sft.config.schema import ColumnSettings, DatasetSettings, LossOn, ModelSettings, Overlong, Settings, Shape
from sft.data import prepare as data_prepare
from sft.data import sources, tokenize
from sft.data.cells import as_text
from sft.data.prepare import prepare, readable
from sft.data.tokenize import IGNORED
from sft.errors import Refusal
from sft.model.chat_template import CHATML

ROWS = [{"instruction": f"Question {i}?", "output": f"Answer {i} " + "word " * i} for i in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; the tokenizer of the session was loaded from the usual one."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def run(tmp_path, loaded_tokenizer):
    """`run(rows, overlong=..., max_seq_length=...)`: the prepared data of these rows."""

    def prepared(rows=ROWS, max_seq_length=2048, tokenizer=None, seed=3407, file="rows.jsonl", **options):
        path = tmp_path / file
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        data = DatasetSettings(path=str(path), **{"template": "alpaca", **options})
        settings = Settings(model=ModelSettings(max_seq_length=max_seq_length), dataset=data, seed=seed)
        return prepare(settings, tokenizer or loaded_tokenizer[0], loaded_tokenizer[1])

    return prepared


@pytest.fixture
def made(monkeypatch):
    """How often tokens were made and not read from the cache."""
    calls, make = [], data_prepare._tokenise_all
    monkeypatch.setattr(data_prepare, "_tokenise_all", lambda *args: calls.append(1) or make(*args))
    return calls


def refusal_of(run, *args, **options) -> str:
    with pytest.raises(Refusal) as refusal:
        run(*args, **options)
    return str(refusal.value)


def lengths_of(split) -> list[int]:
    return [len(row["input_ids"]) for row in split]


# ---------------------------------------------------------------------------------------------- over-long rows


def test_overlong_rows_are_refused_and_counted_by_default(run):
    longest = run(eval_fraction=0.0).facts["lengths"]["train"]["max"]
    every = lengths_of(run(eval_fraction=0.0).train)
    text = refusal_of(run, max_seq_length=60, eval_fraction=0.0)
    assert f"{sum(n > 60 for n in every)} of 20 train rows are longer (the longest has {longest} tokens)" in text
    assert f"model.max_seq_length={-(-longest // 64) * 64}" in text and "dataset.overlong=drop" in text
    assert len(run(max_seq_length=longest, eval_fraction=0.0).train) == 20, "a row of just this length fits"


def test_overlong_rows_of_both_splits_are_named_together(run):
    text = refusal_of(run, max_seq_length=20, eval_fraction=0.2)
    assert "16 of 16 train rows and 4 of 4 eval rows are longer" in text


def test_overlong_rows_are_dropped_and_counted(run):
    every = lengths_of(run(eval_fraction=0.0).train)
    prepared = run(max_seq_length=60, overlong=Overlong.drop, eval_fraction=0.0)
    dropped = sum(n > 60 for n in every)
    assert 0 < dropped < 20 and prepared.facts["dropped_rows"] == dropped
    assert lengths_of(prepared.train) == [n for n in every if n <= 60]
    assert prepared.facts["truncated_rows"] == prepared.facts["rows_without_eos"] == 0
    assert f"{dropped} rows over 60 tokens were left out." in prepared.facts["warnings"]


def test_overlong_rows_are_truncated_and_counted(run, tokenizer):
    every = lengths_of(run(eval_fraction=0.0).train)
    prepared = run(max_seq_length=60, overlong=Overlong.truncate, eval_fraction=0.0)
    cut = sum(n > 60 for n in every)
    assert lengths_of(prepared.train) == [min(n, 60) for n in every]
    assert prepared.facts["truncated_rows"] == prepared.facts["rows_without_eos"] == cut > 0
    ends = [row["labels"][-1] == tokenizer.eos_token_id for row in prepared.train]
    assert ends.count(False) == cut
    assert any("lost their end mark" in warning for warning in prepared.facts["warnings"])


def test_rows_whose_whole_answer_is_cut_off_are_left_out(run):
    rows = [*ROWS[:3], {"instruction": "long " * 80, "output": "x"}]
    prepared = run(rows, max_seq_length=80, overlong=Overlong.truncate, eval_fraction=0.0)
    assert len(prepared.train) == 3 and prepared.facts["rows_without_labels"] == 1
    assert prepared.facts["truncated_rows"] == 0, "the row is not there to be cut"
    assert any("cut-off answer" in warning for warning in prepared.facts["warnings"])


def test_no_row_left_says_which_setting_took_them(run):
    text = refusal_of(run, max_seq_length=20, overlong=Overlong.drop, eval_fraction=0.0)
    assert "dataset.overlong=drop" in text and "model.max_seq_length=20" in text
    text = refusal_of(run, max_seq_length=20, overlong=Overlong.truncate, eval_fraction=0.0)
    assert "has an answer left to learn" in text and "columns.output" not in text


# ------------------------------------------------------------------------------------------------ empty answers


def test_empty_answers_are_left_out_and_counted(run):
    rows = [*ROWS[:5], {"instruction": "q", "output": ""}, {"instruction": "q", "output": None}, {"instruction": "q"}]
    prepared = run(rows, eval_fraction=0.0)
    assert len(prepared.train) == 5 and prepared.facts["rows_without_labels"] == 3
    assert "3 rows have an empty answer and were left out." in prepared.facts["warnings"]
    assert prepared.facts["rows"] == {"read": 8, "filtered": 0, "train": 5}


def test_only_empty_answers_are_refused_with_the_column(run):
    rows = [{"instruction": "q", "output": " "}] * 3
    assert "dataset.columns.output=output" in (text := refusal_of(run, rows, eval_fraction=0.0)) and "all are empty" in text
    rows = [{"messages": [{"role": "user", "content": "q"}]}] * 3
    assert "dataset.columns.messages=messages" in refusal_of(run, rows, eval_fraction=0.0, template="chat")


def test_held_out_rows_that_all_go_are_refused(run):
    text = refusal_of(run, [*ROWS[:9], {"instruction": "q", "output": ""}], shuffle=False)
    assert "None of the held-out rows" in text and "dataset.eval_fraction=0" in text and "seed=" in text


def test_answers_without_a_question_are_learnt_and_warned_of(run):
    prepared = run([*ROWS[:4], {"output": "x"}, {"instruction": "", "output": "y"}], eval_fraction=0.0)
    assert len(prepared.train) == 6 and "2 rows have an answer but no question." in prepared.facts["warnings"]


# ----------------------------------------------------------------------------------------------------- columns


def test_all_missing_columns_at_once_with_the_likeliest_match(run):
    rows = [{"Question": "q", "answer": "x", "id": 1}]
    text = refusal_of(run, rows, shape=Shape.instruction, keep={"idd": "1"})
    assert "3 problems" in text and text.count("It has: Question, answer, id.") == 3
    assert "dataset.columns.instruction=Question" in text and "dataset.columns.output=answer" in text
    assert "'dataset.keep.id=\"1\"'" in text


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("问题", "回答"), """'dataset.columns.instruction="问题"' 'dataset.columns.output="回答"'"""),
        (("input", "reply"), "dataset.columns.instruction=input dataset.columns.input=null dataset.columns.output=reply"),
        (("input", "output"), "dataset.columns.instruction=input dataset.columns.input=null"),
        (("query", "response"), "dataset.columns.instruction=query dataset.columns.output=response"),
        (("content", "n"), "dataset.columns.text=content"),
        (("left", "right"), "dataset.shape=text dataset.columns.text=<column>"),
    ],
)
def test_unknown_columns_are_listed_with_a_guess(run, columns, hint):
    text = refusal_of(run, [dict.fromkeys(columns, "x")])
    assert hint in text and all(column in text for column in columns)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"instruction": "q", "output": "x"}, "instruction"),
        ({"prompt": "q", "completion": "x"}, "prompt_completion"),
        ({"text": "x"}, "text"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}, "conversations"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], "prompt": "q"}, "messages"),
    ],
)
def test_shapes_are_recognised_by_their_columns(run, row, shape):
    facts = run([row] * 3, template="auto", eval_fraction=0.0).facts
    assert facts["shape"] == shape and facts["template"] == ("plain" if shape == "text" else "chat")


def test_a_column_that_only_later_rows_have_counts(run):
    rows = [{"instruction": f"{i}", "output": "x"} for i in range(1500)] + [{"instruction": "q", "output": "x", "topic": "t"}]
    assert len(run(rows, eval_fraction=0.0, keep={"topic": "t"}).train) == 1


def test_a_name_in_the_template_that_no_column_has_is_refused(run):
    text = refusal_of(run, template="Q: {instructon}\nA:\n{output}")
    assert "{instructon}" in text and """hint: 'dataset.template="Q: {instruction}\\nA:\\n{output}"'""" in text
    rows = [row | {"topic": "T"} for row in ROWS]
    assert run(rows, template="{topic}: {instruction}\n{output}").facts["examples"][0]["text"].startswith("T: Question")


def test_turns_go_through_a_text_template_only_if_they_are_a_question_and_an_answer(run):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    assert (
        run([{"messages": turns}], eval_fraction=0.0)
        .facts["examples"][0]["text"]
        .endswith("q\n\n### Input:\n\n\n### Response:\nx<|im_end|>")
    )
    text = refusal_of(run, [{"messages": turns * 2}], eval_fraction=0.0)
    assert "row 1 of the data" in text and "dataset.template=chat" in text


def test_a_row_at_fault_is_named_with_its_number(run, make_tokenizer):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}
    bad = {"messages": [{"role": "robot", "content": "q"}]}
    text = refusal_of(run, [good, good, bad], template="chat", eval_fraction=0.0)
    assert "row 3 of the data" in text and "unknown speaker 'robot'" in text
    picky = make_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML)
    text = refusal_of(run, [good], template="chat", eval_fraction=0.0, system_prompt="Be brief.", tokenizer=picky)
    assert "row 1 of the data" in text and "dataset.system_prompt=null" in text


def test_rows_that_are_nested_too_deeply_are_refused_with_their_number(run):
    deep = "x"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        as_text(deep)
    text = refusal_of(run, [{"messages": "[" * 100_000}], template="chat", eval_fraction=0.0)
    assert "row 1 of the data" in text and "column 'messages' is nested too deeply" in text


def test_half_of_an_emoji_is_refused_with_its_row(tmp_path, loaded_tokenizer):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"instruction": "q", "output": "x"}\n{"instruction": "q", "output": "cut \\ud83d"}', encoding="utf-8")
    settings = Settings(dataset=DatasetSettings(path=str(path), template="alpaca", eval_fraction=0.0))
    with pytest.raises(Refusal, match="row 2 of the data") as refusal:
        prepare(settings, *loaded_tokenizer)
    assert "half of a character" in str(refusal.value)


def test_system_prompt_stands_in_every_row_without_one(run):
    rows = [*({**row, "system": ""} for row in ROWS[:3]), {**ROWS[3], "system": "Its own."}]
    texts = [
        e["text"]
        for e in run(rows, template="chat", system_prompt="Be brief.", shuffle=False, eval_fraction=0.0, max_rows=3).facts[
            "examples"
        ]
    ]
    assert all(text.startswith("<|im_start|>system\nBe brief.<|im_end|>") for text in texts)
    texts = run(rows[3:], template="chat", system_prompt="Be brief.", eval_fraction=0.0).facts["examples"]
    assert texts[0]["text"].startswith("<|im_start|>system\nIts own.<|im_end|>")


# ------------------------------------------------------------------------------------------------------- facts


def test_facts_are_what_a_recount_gives(run, tokenizer):
    rows = [*ROWS, {"instruction": "q", "output": ""}]
    prepared = run(rows, drop={"instruction": "Question 1[0-4]"}, eval_fraction=0.25)
    facts, train, held_out = prepared.facts, prepared.train, prepared.eval
    assert facts["rows"] == {"read": 21, "filtered": 5, "train": len(train), "eval": len(held_out)}
    assert len(train) + len(held_out) + facts["rows_without_labels"] == 16
    assert facts["train_tokens"] == sum(lengths_of(train)) and facts["eval_tokens"] == sum(lengths_of(held_out))
    assert facts["trained_tokens"] == sum(label != IGNORED for row in train for label in row["labels"])
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert facts["lengths"]["eval"]["min"] <= min(lengths_of(held_out)) and facts["lengths"]["eval"]["max"] >= max(
        lengths_of(held_out)
    )
    assert facts["examples"][0]["input_ids"] == train[0]["input_ids"] and len(facts["examples"]) == 3
    assert "".join(facts["examples"][0]["tokens"]) == facts["examples"][0]["text"]
    assert (facts["eos_token"], facts["stop_tokens"]) == ("<|im_end|>", ["<|im_end|>"])
    assert json.loads(json.dumps(facts)) == facts


def test_lengths_of_equal_rows_are_exact(run):
    prepared = run([ROWS[3]] * 10, eval_fraction=0.0)
    n = len(prepared.train[0]["input_ids"])
    assert prepared.facts["lengths"]["train"] == {"min": n, "p50": n, "p90": n, "p99": n, "max": n, "mean": float(n)}


def test_loss_on_all_learns_every_token(run):
    prepared = run(loss_on=LossOn.all)
    assert all(row["labels"] == row["input_ids"] for row in prepared.train)
    assert prepared.facts["trained_tokens"] == prepared.facts["train_tokens"]


def test_a_prompt_that_grows_into_the_answer_is_warned_of(run):
    facts = run(template="{instruction} {output}", eval_fraction=0.0).facts
    assert facts["rows_with_boundary_merge"] == 20 and any("a token joins the prompt" in w for w in facts["warnings"])


def test_readable_gives_whole_characters(tokenizer):
    ids = tokenizer("a😀中👍🏽 é")["input_ids"]
    pieces = readable(ids, tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == "a😀中👍🏽 é" and "\ufffd" not in "".join(pieces)


# ------------------------------------------------------------------------------------------------------- cache


def test_the_second_call_reads_the_cache_and_gives_the_same(run, made, monkeypatch):
    one, read = run(), sources.read_rows
    monkeypatch.setattr(data_prepare, "read_rows", None)  # no row of the file is read again
    two = run()
    monkeypatch.setattr(data_prepare, "read_rows", read)
    assert len(made) == 1
    assert one.facts == two.facts and one.train.to_list() == two.train.to_list() and one.eval.to_list() == two.eval.to_list()
    assert run(eval_fraction=0.0).eval is None


CHANGES = [
    {"seed": 1}, {"template": "chat"}, {"max_seq_length": 1024}, {"loss_on": LossOn.all}, {"max_rows": 10}, {"rows": ROWS[1:]},
    {"system_prompt": "x", "template": "chat"}, {"drop": {"output": "zzz"}}, {"columns": ColumnSettings(system=None)},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[next(iter(change)) for change in CHANGES])
def test_whatever_shapes_the_tokens_misses_the_cache(run, made, change):
    run()
    run(**change)
    assert len(made) == 2


def test_another_chat_template_or_special_token_misses_the_cache(run, made, make_tokenizer):
    run(template="chat")
    run(template="chat", tokenizer=make_tokenizer(CHATML))
    run(template="chat", tokenizer=make_tokenizer(CHATML, pad="<|im_end|>"))
    run(template="chat", tokenizer=make_tokenizer(CHATML, bos="<s>", adds_bos=True))
    assert len(made) == 4


def test_a_copy_of_the_file_shares_the_tokens_under_its_own_name(run, made):
    assert run().facts["source"].endswith("rows.jsonl")
    assert run(file="copy.jsonl").facts["source"].endswith("copy.jsonl") and len(made) == 1


@pytest.mark.parametrize("torn", ["facts.json", "train.arrow", "eval.arrow", "half facts", "half train"])
def test_a_damaged_cache_is_made_again(run, made, cache, torn):
    wanted = run()
    rows = wanted.train.to_list()
    (folder,) = cache.iterdir()
    if torn.startswith("half"):
        file = folder / {"half facts": "facts.json", "half train": "train.arrow"}[torn]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        (folder / torn).unlink()
    again = run()
    assert len(made) == 2 and again.train.to_list() == rows and again.facts == wanted.facts
    run()
    assert len(made) == 2 and [p.name for p in cache.iterdir()] == [folder.name], "nothing is left beside it"


def _prepare_elsewhere(path: str, cache: str, tokenizer, stop_ids, start, results) -> None:
    import os

    os.environ["SFT_CACHE"] = cache
    start.wait()
    data = DatasetSettings(path=path, template="alpaca")
    prepared = prepare(Settings(dataset=data), tokenizer, stop_ids)
    results.put((len(prepared.train), sum(lengths_of(prepared.train)), prepared.facts["train_tokens"]))


def test_two_processes_may_prepare_the_same_at_once(tmp_path, cache, loaded_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    arguments = (str(path), str(cache.parent), *loaded_tokenizer, start, results)
    processes = [context.Process(target=_prepare_elsewhere, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert found[0] == found[1] and found[0][0] == 18 and found[0][1] == found[0][2]
    assert len(list(cache.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------- eval_split


def test_rows_of_an_eval_split_are_counted_apart(monkeypatch, loaded_tokenizer):
    tables = {"train": ROWS, "test": [{"instruction": f"t{i}", "output": "x"} for i in range(8)]}
    monkeypatch.setattr(
        data_prepare, "read_rows", lambda data, split: (tables[split], {"name": f"a/b ({split})", "hash": split})
    )
    data = DatasetSettings(name="a/b", eval_split="test", eval_fraction=0.0, max_eval_rows=5, template="alpaca")
    prepared = prepare(Settings(dataset=data), *loaded_tokenizer)
    assert prepared.facts["rows"] == {"read": 20, "filtered": 0, "read_eval": 8, "train": 20, "eval": 5}
    assert {row["question"][0] for row in prepared.eval} == {"t"}
    tables["test"] = [{"question": "q", "output": "x"}]
    with pytest.raises(Refusal, match=r"a/b \(test\) has no column 'instruction'"):
        prepare(Settings(dataset=replace(data, max_eval_rows=6)), *loaded_tokenizer)
    tables["test"] = [{"instruction": "q", "output": ""}]
    with pytest.raises(Refusal, match="None of the held-out rows"):
        prepare(Settings(dataset=replace(data, max_eval_rows=7)), *loaded_tokenizer)


def test_the_cache_lies_where_the_user_says(cache, run):
    run()
    assert Path(cache).is_dir() and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("shape", ["word ", "x"])
def test_a_row_of_a_hundred_megabytes_is_not_tokenised_to_its_end(run, shape, monkeypatch):
    tokenised, make = [], tokenize.tokenise
    monkeypatch.setattr(data_prepare, "tokenise", lambda rows, t: tokenised.extend(len(r.text) for r in rows) or make(rows, t))
    rows = [*ROWS, {"instruction": "Question?", "output": shape * (20_000_000 // len(shape))}]
    prepared = run(rows, overlong=Overlong.drop, eval_fraction=0.0)
    assert prepared.facts["dropped_rows"] == 1 and len(prepared.train) == 20 and max(tokenised) <= 1_000_000
    text = refusal_of(run, rows, eval_fraction=0.0)
    assert (
        "1 of 21 train rows are longer (the longest has more than" in text
        and "model.max_seq_length=" not in text.split("hint")[1]
    )


def test_the_tokens_of_a_row_that_is_cut_are_those_of_the_whole_row(run, monkeypatch):
    rows = [{"instruction": "Question?", "output": "some words " * 2000}] * 2
    options = {"overlong": Overlong.truncate, "eval_fraction": 0.0, "max_seq_length": 60}
    whole = run(rows, **options).train[0]
    monkeypatch.setattr(data_prepare, "FAR_LEAST", 6000)
    short = run(rows, file="again.jsonl", seed=1, **options).train[0]
    assert len(short["input_ids"]) == 60 and short["input_ids"] == whole["input_ids"] and short["labels"] == whole["labels"]
