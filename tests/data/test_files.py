"""Files as people have them: folders, globs and lists of shards, `save_to_disk`, arrow, gzip, held-out rows of their own."""

import gzip
import hashlib
import json
import os
import resource
import shlex
import subprocess
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from sft.cli.check import check_command_line
from sft.config.fingerprint import config_hash
from sft.config.rules import warnings_for
from sft.config.schema import DatasetSettings, Settings
from sft.data import prepare as data_prepare
from sft.data.prepare import prepare
from sft.data.sources import held_out_data, read_rows, source_of
from sft.errors import Problem, Refusal
from sft.export.card import _public_command
from sft.model import builtin
from sft.runs.record import Context
from tests.conftest import ROOT, make_settings
from tests.hints import problems_of, type_hints


def rows_of(*numbers: int) -> list[dict]:
    return [{"instruction": f"Question {n}?", "output": f"Answer {n}"} for n in numbers]


def write(path: Path, rows: list[dict]) -> Path:
    """The rows as jsonl, a json list or csv, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, text = path.name.lower().removesuffix(".gz"), "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".json"):
        text = json.dumps(rows)
    if name.endswith(".csv"):
        text = "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in [list(rows[0]), *(r.values() for r in rows)])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path, split="train", **options) -> list[dict]:
    return list(read_rows(DatasetSettings(path=path if isinstance(path, list) else str(path), **options), split)[0])


def hash_of(path, **options) -> str:
    return source_of(DatasetSettings(path=path if isinstance(path, list) else str(path), **options))["hash"]


def refused(*argv: str) -> list[Problem]:
    with pytest.raises(Refusal) as caught:
        check_command_line(ROOT / "conf", list(argv), False)
    type_hints(argv, caught.value.problems, lambda command: problems_of(command, False))
    return caught.value.problems


def problem_of(*argv: str) -> Problem:
    (problem,) = refused(*argv)
    return problem


def settings_after(hint: str, *argv: str) -> Settings:
    """The settings of a command whose first hint was typed, which is not refused for another reason."""
    words = shlex.split(hint.splitlines()[0].split("   ")[0])
    keys = {word.partition("=")[0] for word in words}
    argv = (*(word for word in argv if word.partition("=")[0] not in keys), *words)
    check_command_line(ROOT / "conf", list(argv), False)
    return make_settings(*argv)


def refusal_of(path, **options) -> str:
    with pytest.raises(Refusal) as caught:
        read(path, **options)
    return str(caught.value)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder and a cache of the test's own."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(builtin.local_model(builtin.TINY_RANDOM).parent)  # made once
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def shards():
    """Three shards, of which the second one by the alphabet is the last one by number."""
    for number, rows in ((1, (0, 1)), (10, (3,)), (2, (2,))):
        write(Path(f"shards/part-{number}.jsonl"), rows_of(*rows))
    return Path("shards")


# ------------------------------------------------------------------------------------------ folders, globs and lists


@pytest.mark.parametrize(
    "path", ["shards", "shards/", "./shards", "shards/*.jsonl", "shards/part-*", "*/*.jsonl", "**/*.jsonl"]
)
def test_a_folder_or_a_glob_is_all_its_files_by_number(shards, path):
    assert read(path) == rows_of(0, 1, 2, 3)
    settings = make_settings(f'dataset.path="{path}"')
    check_command_line(ROOT / "conf", [f'dataset.path="{path}"'], False)
    assert list(read_rows(settings.dataset, "train")[0]) == rows_of(0, 1, 2, 3)


def test_a_list_keeps_its_order_and_takes_whatever_a_path_takes(shards):
    write(Path("more.csv"), rows_of(7))
    assert read(["shards/part-2.jsonl", "shards/part-1.jsonl"]) == rows_of(2, 0, 1)
    assert read(["more.csv", "shards"]) == rows_of(7, 0, 1, 2, 3)
    typed = ["dataset.path=[shards/part-2.jsonl,shards/part-1.jsonl]"]
    check_command_line(ROOT / "conf", typed, False)
    assert make_settings(*typed).dataset.path == ["shards/part-2.jsonl", "shards/part-1.jsonl"]


def test_hidden_files_and_folders_are_no_shards_and_other_files_are_named(shards):
    write(Path("shards/.part-3.jsonl"), rows_of(9))
    write(Path("shards/old/part-4.jsonl"), rows_of(9))
    Path("shards/README.md").write_text("x")
    write(Path("shards/part-5.jsonl"), [])
    assert read("shards") == rows_of(0, 1, 2, 3)
    (other, empty) = (line for line in warnings_for(make_settings("dataset.path=shards")) if "shards" in line)
    assert other == "dataset.path=shards: of 6 entries, 2 are not read: README.md, old."
    assert empty == "dataset.path=shards: of 6 entries, 1 is empty: part-5.jsonl."


def test_a_file_whose_name_looks_like_a_glob_is_itself():
    write(Path("data[1].jsonl"), rows_of(1))
    write(Path("data1.jsonl"), rows_of(2))
    assert read("data[1].jsonl") == rows_of(1)


def test_a_row_of_several_files_is_numbered_over_all_and_columns_are_the_union(shards):
    write(Path("shards/part-11.jsonl"), [{"instruction": "q", "output": "a", "input": "i"}])
    rows, _ = read_rows(DatasetSettings(path="shards"), "train")
    assert len(rows) == 5 and list(rows.column_names) == ["instruction", "output", "input"]
    assert [rows[i]["instruction"] for i in (4, 0, 3, 1)] == ["q", "Question 0?", "Question 3?", "Question 1?"]
    with pytest.raises(IndexError):
        rows[5]


def test_an_error_names_the_file_and_its_line(shards):
    with open("shards/part-2.jsonl", "a") as file:
        file.write("{torn\n")
    assert "shards/part-2.jsonl, line 2" in refusal_of("shards")


def test_memory_stays_at_bytes_a_row():
    for part in range(3):
        write(Path(f"many/{part}.jsonl"), [{"instruction": "x" * 500, "output": "y"}] * 3000)
    tracemalloc.start()
    rows, _ = read_rows(DatasetSettings(path="many"), "train")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(rows) == 9000 and held < 9000 * 40


def test_more_shards_than_a_process_may_usually_open_are_read(monkeypatch):
    for part in range(120):
        write(Path(f"many/{part}.jsonl"), rows_of(part))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limits[1]))
    try:
        assert read("many") == rows_of(*range(120))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_several_files_have_a_hash_over_theirs_and_one_file_its_own(shards):
    own = [hashlib.sha256(Path(f"shards/part-{n}.jsonl").read_bytes()).hexdigest() for n in (1, 2, 10)]
    assert hash_of("shards/part-1.jsonl") == hash_of(["shards/part-1.jsonl"]) == hash_of("shards/part-[1].jsonl") == own[0]
    assert hash_of("shards") == hash_of("shards/*.jsonl") == hashlib.sha256("\n".join(own).encode()).hexdigest()
    assert hash_of(["shards/part-2.jsonl", "shards/part-1.jsonl"]) != hash_of(["shards/part-1.jsonl", "shards/part-2.jsonl"])
    source = source_of(DatasetSettings(path="shards"))
    assert source["name"] == "shards (3 files)"
    assert source["files"] == ["shards/part-1.jsonl", "shards/part-2.jsonl", "shards/part-10.jsonl"]


# ------------------------------------------------------------------------------------------------ refusals of paths


def test_several_kinds_are_refused_with_their_numbers_and_a_glob_that_reads_one(shards):
    write(Path("shards/a.csv"), rows_of(8))
    for path in ("shards", "shards/*"):
        problem = problem_of(f"dataset.path={path}")
        assert "3 .jsonl, 1 .csv" in problem.why
        assert problem.fix.splitlines() == ["'dataset.path=\"shards/*.jsonl\"'", "dataset.path=shards/a.csv"]
        assert settings_after(problem.fix, f"dataset.path={path}").dataset.path == "shards/*.jsonl"
    write(Path("more/b.jsonl"), rows_of(9))
    assert read(settings_after(problem_of("dataset.path=**").fix).dataset.path) == rows_of(9, 0, 1, 2, 3)


def test_a_hint_never_names_one_shard_of_several(shards):
    problem = problem_of("dataset.path=shards/part-3.jsonl")
    assert problem.why == "There is no such file."
    assert read(settings_after(problem.fix).dataset.path) == rows_of(0, 1, 2, 3)
    problem = problem_of("dataset.path=shards/*.json")
    assert "No file" in problem.why and read(settings_after(problem.fix).dataset.path) == rows_of(0, 1, 2, 3)
    assert problem_of("dataset.path=shard").fix == "dataset.path=shards"


def test_a_misspelt_file_of_a_list_is_mended_in_the_list(shards):
    write(Path("my data.jsonl"), rows_of(5))
    problem = problem_of('dataset.path=[shards,"my dota.jsonl"]')
    assert settings_after(problem.fix).dataset.path == ["shards", "my data.jsonl"]


def test_files_one_folder_down_are_hinted_at(shards):
    Path("up").mkdir()
    shards.rename("up/data")
    problem = problem_of("dataset.path=up")
    assert "itself holds no" in problem.why and read(settings_after(problem.fix).dataset.path) == rows_of(0, 1, 2, 3)
    write(Path("up/more/part-3.jsonl"), rows_of(9))
    assert read(settings_after(problem_of("dataset.path=up").fix).dataset.path) == rows_of(0, 1, 2, 3, 9)


def test_a_folder_of_splits_is_not_trained_on_as_a_whole():
    for name, rows in (("train-00000-of-00002", (0,)), ("train-00001-of-00002", (1,)), ("test-00000-of-00001", (2,))):
        write(Path(f"data/{name}.jsonl"), rows_of(*rows))
    problem = problem_of("dataset.path=data")
    assert "several splits" in problem.why
    data = settings_after(problem.fix, "dataset.path=data").dataset
    assert read(data.path) == rows_of(0, 1) and read(data.eval_path) == rows_of(2)
    assert problem.fix.splitlines()[1] == "'dataset.path=\"data/*.jsonl\"'   reads all of them"
    assert len(read(settings_after(problem.fix.splitlines()[1]).dataset.path)) == 3
    assert "eval_path" not in problem_of("dataset.path=data", "dataset.eval_path=data/test-00000-of-00001.jsonl").fix


@pytest.mark.parametrize("path", ["[]", "{a: 1}", "true", "[[a.jsonl]]", "[a.jsonl,null]", "[1.5,{a: 1}]"])
def test_a_path_is_a_text_or_a_list_of_texts(path):
    write(Path("a.jsonl"), rows_of(1))
    for key in ("path", "eval_path"):
        problem = problem_of(f"dataset.{key}={path}")
        assert "a file, a folder, a glob, or a list of them" in problem.why and problem.fix


def test_a_name_that_reads_as_a_number_is_hinted_at_as_a_text():
    write(Path("2024/a.jsonl"), rows_of(1))
    write(Path("2023/a.jsonl"), rows_of(0))
    assert read(settings_after(problem_of("dataset.path=2024").fix).dataset.path) == rows_of(1)
    assert read(settings_after(problem_of("dataset.path=[2023,2024]").fix).dataset.path) == rows_of(0, 1)


def test_several_paths_without_brackets_are_hinted_at_as_a_list(shards):
    problem = problem_of("dataset.path=shards/part-1.jsonl,shards/part-2.jsonl")
    assert read(settings_after(problem.fix).dataset.path) == rows_of(0, 1, 2)


def test_shards_that_are_links_to_nothing_or_damaged_are_named(shards):
    Path("shards/part-3.jsonl").symlink_to("gone.jsonl")
    assert "1 of 4 files, part-3.jsonl: There is no such file" in problem_of("dataset.path=shards").why
    for name in ("a", "b"):
        Path(f"{name}.parquet").touch()
    assert problem_of("dataset.path=*.parquet").why == "2 of 2 files, a.parquet, b.parquet: The file is empty."


def test_a_folder_that_cannot_be_listed_is_refused(shards, monkeypatch):
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "shards":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    problem = problem_of("dataset.path=shards")
    assert "Permission denied" in problem.why and problem.fix == "chmod u+rx shards"


def test_files_without_rows_are_refused_together():
    for name in ("a", "b"):
        write(Path(f"data/{name}.json"), [])
    assert "The 2 files hold no rows." in refusal_of("data")


# --------------------------------------------------------------------------------------------------------- formats


def save(folder: str = "saved", splits: tuple[str, ...] = ()) -> None:
    rows = Dataset.from_list(rows_of(0, 1, 2))
    if splits:
        DatasetDict({name: Dataset.from_list(rows_of(i)) for i, name in enumerate(splits)}).save_to_disk(folder)
    else:
        rows.save_to_disk(folder, num_shards=2)


def test_a_folder_of_save_to_disk_is_read_without_the_format_that_was_set():
    save()
    Dataset.load_from_disk("saved").with_format("numpy", columns=["output"]).save_to_disk("formatted")
    assert read("saved") == read("formatted") == rows_of(0, 1, 2)
    check_command_line(ROOT / "conf", ["dataset.path=saved"], False)
    before = hash_of("saved")
    assert read(["saved", "formatted"]) == rows_of(0, 1, 2, 0, 1, 2) and before == hash_of("saved")
    Dataset.from_list(rows_of(7)).save_to_disk("saved2")
    assert hash_of("saved2") != before


def test_the_splits_of_a_saved_dict_are_chosen_by_their_settings():
    save("saved", ("train", "test"))
    assert read("saved") == rows_of(0) and read("saved", "test") == rows_of(1)
    argv = ["dataset.path=saved", "dataset.eval_split=test", "dataset.eval_fraction=0"]
    check_command_line(ROOT / "conf", argv, False)
    held_out = held_out_data(make_settings(*argv).dataset)
    assert list(read_rows(held_out, held_out.split)[0]) == rows_of(1)
    assert hash_of("saved") != hash_of("saved", split="test")
    assert source_of(DatasetSettings(path="saved", split="test"))["name"] == "saved (test)"


def test_a_wrong_split_is_refused_with_those_there_are():
    save("saved", ("train_sft", "test_sft"))
    problem = problem_of("dataset.path=saved")
    assert problem.what == "dataset.split=train" and "train_sft, test_sft" in problem.why
    assert settings_after(problem.fix, "dataset.path=saved").dataset.split == "train_sft"
    argv = ["dataset.path=saved", "dataset.split=train_sft", "dataset.eval_split=test", "dataset.eval_fraction=0"]
    problem = problem_of(*argv)
    assert settings_after(problem.fix, *argv).dataset.eval_split == "test_sft"
    problem = problem_of("dataset.path=saved", "dataset.split=train_sft", "dataset.eval_path=saved")
    assert read(settings_after(problem.fix, "dataset.path=saved", "dataset.split=train_sft").dataset.eval_path) == rows_of(1)


def test_a_damaged_folder_of_save_to_disk_is_refused():
    save()
    Path("saved/data-00000-of-00002.arrow").write_bytes(b"x" * 100)
    assert "Not a readable folder of save_to_disk" in refusal_of("saved")
    Path("saved/state.json").write_text("{}")
    assert "Not a readable folder of save_to_disk" in refusal_of("saved")
    save("dict", ("train",))
    Path("dict/dataset_dict.json").write_text("{torn")
    assert "dataset_dict.json cannot be read" in problem_of("dataset.path=dict").why


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_both_forms_of_arrow_files_are_read(form):
    table = pa.Table.from_pylist(rows_of(*range(5)))
    with pa.OSFile("x.arrow", "wb") as sink, form(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert read("x.arrow") == read("x.arrow") == rows_of(*range(5))
    Path("x.arrow").write_bytes(Path("x.arrow").read_bytes()[:60])
    assert "Not a readable arrow file" in refusal_of("x.arrow")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".csv.gz", ".JSONL.GZ"])
def test_gzip_is_unpacked_once_into_the_cache(tmp_path, suffix):
    path = write(Path(f"x{suffix.lower()}"), rows_of(0, 1)).rename(f"x{suffix}")
    assert read(path) == read(path) == rows_of(0, 1)
    assert len(list((tmp_path / "cache/unpacked").iterdir())) == 1 and list(Path().iterdir()) == [path]
    assert hash_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    check_command_line(ROOT / "conf", [f"dataset.path={path}"], False)


def test_gzip_that_is_damaged_or_none_is_refused(tmp_path):
    path = write(Path("x.jsonl.gz"), rows_of(*range(100)))
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:100] + b"xxxxxxxx" + whole[108:], whole + b"more"):
        path.write_bytes(damaged)
        assert "x.jsonl.gz" in refusal_of(path) and "damaged" in refusal_of(path)
    path.write_text(json.dumps(rows_of(0)[0]))
    text = refusal_of(path)
    assert "not gzip" in text
    hint = text.split("hint: ")[1].split("   ")[0]
    subprocess.run(hint, shell=True, check=True)
    assert read("x.jsonl") == rows_of(0)
    assert list((tmp_path / "cache/unpacked").iterdir()) == [], "nothing that was half unpacked"


def test_a_mistake_inside_gzip_is_named_by_the_packed_file():
    Path("x.jsonl.gz").write_bytes(gzip.compress(b'{"a": "b"}\n{torn\n'))
    assert "1. x.jsonl.gz, line 2\n" in refusal_of("x.jsonl.gz")


# ---------------------------------------------------------------------------------------------------- names of labels


LABELLED = Features(
    {
        "text": Value("string"),
        "label": ClassLabel(names=["negative", "positive"]),
        "tags": List(ClassLabel(names=["a", "b"])),
        "deep": [{"label": ClassLabel(names=["no", "yes"]), "n": Value("int64")}],
        "number": Value("int64"),
    }
)


def labelled() -> Dataset:
    columns = {"text": ["x", "y", "z"], "label": [1, -1, None], "tags": [[0, 1], [], None], "number": [0, 1, 2]}
    columns["deep"] = [[{"label": 1, "n": 1}], [{"label": None, "n": 0}], None]
    return Dataset.from_dict(columns, features=LABELLED)


NAMED = [
    {"text": "x", "label": "positive", "tags": ["a", "b"], "deep": [{"label": "yes", "n": 1}], "number": 0},
    {"text": "y", "label": None, "tags": [], "deep": [{"label": None, "n": 0}], "number": 1},
    {"text": "z", "label": None, "tags": None, "deep": None, "number": 2},
]


def test_numbers_of_labels_are_read_as_their_names(monkeypatch):
    rows = labelled()
    rows.to_parquet("x.parquet")
    rows.save_to_disk("saved")
    assert read("x.parquet") == read("saved") == read("saved/data-00000-of-00001.arrow") == NAMED
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: rows)
    assert list(read_rows(DatasetSettings(name="a/b"), "train")[0]) == NAMED


def test_a_number_of_no_label_is_refused_with_its_row(loaded_tokenizer):
    table = pa.table({"instruction": ["a", "b"], "output": [0, 7]})
    features = Features({"instruction": Value("string"), "output": ClassLabel(names=["no", "yes"])})
    features.arrow_schema  # noqa: B018
    Dataset(table.cast(features.arrow_schema)).to_parquet("x.parquet")
    settings = Settings(dataset=DatasetSettings(path="x.parquet", eval_fraction=0.0, shuffle=False))
    with pytest.raises(Refusal, match="7 is the number of no label of the column 'output'"):
        prepare(settings, *loaded_tokenizer)
    (problem,) = faults(loaded_tokenizer, path="x.parquet", drop={"output": "yes"})
    assert problem.what == "row 2 of the data", "a filter reads it before it is rendered"


# ---------------------------------------------------------------------------------------------------- held-out rows


def prepared(loaded_tokenizer, **options):
    return prepare(Settings(dataset=DatasetSettings(**{"template": "alpaca", **options})), *loaded_tokenizer)


def questions(split) -> list[str]:
    return [row["question"] for row in split]


def test_eval_path_names_the_held_out_rows_in_place_of_a_fraction(loaded_tokenizer, shards):
    write(Path("val.jsonl"), rows_of(20, 21, 1))
    check_command_line(ROOT / "conf", ["dataset.path=shards", "dataset.eval_path=val.jsonl"], False)
    found = prepared(loaded_tokenizer, path="shards", eval_path="val.jsonl", shuffle=False)
    assert found.facts["rows"] == {"read": 4, "filtered": 0, "read_eval": 3, "train": 4, "eval": 3}
    assert {row["reference"]: row["row"] for row in found.eval} == {"Answer 20": 1, "Answer 21": 2, "Answer 1": 3}
    assert found.facts["duplicates"] == {"held_out": 1, "train": 0, "rows": [[3, 2]]}
    assert (found.facts["source"], found.facts["eval_source"]) == ("shards (3 files)", "val.jsonl")
    few = prepared(loaded_tokenizer, path="shards", eval_path=["val.jsonl", "shards"], max_eval_rows=2, shuffle=False)
    assert {row["reference"] for row in few.eval} == {"Answer 20", "Answer 21"} and few.facts["rows"]["read_eval"] == 7


def test_held_out_rows_go_through_the_filters_and_need_the_columns(loaded_tokenizer, shards):
    write(Path("val.jsonl"), rows_of(20, 21))
    options = {"path": "shards", "eval_path": "val.jsonl"}
    assert len(prepared(loaded_tokenizer, **options, drop={"output": "20"}).eval) == 1
    with pytest.raises(Refusal, match="None of the 2 held-out rows passes the filters"):
        prepared(loaded_tokenizer, **options, drop={"output": "2[01]"})
    write(Path("val.jsonl"), [{"question": "q", "output": "a"}])
    with pytest.raises(Refusal, match=r"val\.jsonl has no column 'instruction'") as refusal:
        prepared(loaded_tokenizer, **options)
    assert "hint: dataset.columns" not in str(refusal.value), "which would miss the rows to train on"


GOOD, BAD = {"instruction": "q", "output": "a"}, {"instruction": "q", "output": ["a"]}


def faults(loaded_tokenizer, **options) -> list[Problem]:
    with pytest.raises(Refusal) as refusal:
        prepared(loaded_tokenizer, **{"template": "chat", "shuffle": False, "eval_fraction": 0.0, **options})
    return refusal.value.problems


def test_a_fault_in_a_held_out_row_names_it_as_one_with_its_file_and_number(loaded_tokenizer):
    write(Path("train.jsonl"), [GOOD, BAD, GOOD, GOOD])
    write(Path("val.jsonl"), [GOOD, GOOD, BAD, BAD])
    both = faults(loaded_tokenizer, path="train.jsonl", eval_path="val.jsonl")
    assert [p.what for p in both] == ["row 2 of the data", "held-out rows 3 and 4 of val.jsonl (2 of 4 rows)"]
    assert both[1].fix.endswith("dataset.skip_bad_rows=true   leaves 3 of 8 rows out") and "skip" not in both[0].fix
    write(Path("more/a.jsonl"), [GOOD, GOOD])
    write(Path("more/b.jsonl"), [GOOD, BAD])
    write(Path("good.jsonl"), [GOOD])
    (shard,) = faults(loaded_tokenizer, path="good.jsonl", eval_path="more")
    assert shard.what == "held-out row 4 of more (2 files), row 2 of more/b.jsonl"
    assert faults(loaded_tokenizer, path="more")[0].what == "row 4 of the data, row 2 of more/b.jsonl"


def test_a_fault_in_a_row_of_the_held_out_fraction_says_that_it_is_held_out(loaded_tokenizer):
    write(Path("rows.jsonl"), [GOOD, GOOD, BAD, GOOD])
    (problem,) = faults(loaded_tokenizer, path="rows.jsonl", eval_fraction=0.5)
    assert problem.what == "held-out row 3 of the data" and "leaves 1 of 4 rows out" in problem.fix
    assert prepared(loaded_tokenizer, path="rows.jsonl", eval_fraction=0.5, shuffle=False, skip_bad_rows=True,
                    template="chat").facts["rows"]["eval"] == 1  # fmt: skip


def test_rows_of_which_skipping_leaves_none_are_refused_and_skipping_is_not_hinted_at(loaded_tokenizer):
    write(Path("train.jsonl"), [GOOD, GOOD])
    write(Path("val.jsonl"), [BAD])
    for skip in (False, True):
        (problem,) = faults(loaded_tokenizer, path="train.jsonl", eval_path="val.jsonl", skip_bad_rows=skip)
        assert problem.what == "held-out row 1 of val.jsonl" and "holds a list" in problem.why and "skip" not in problem.fix


def test_a_held_out_file_that_cannot_be_read_or_filtered_is_said_to_be_the_held_out_one(loaded_tokenizer, monkeypatch):
    write(Path("train.jsonl"), [GOOD, GOOD])
    Path("val.jsonl").write_text('{"instruction": "q"}\n{torn\n')
    options = {"path": "train.jsonl", "eval_path": "val.jsonl"}
    assert faults(loaded_tokenizer, **options)[0].what == "the held-out rows: val.jsonl, line 2"
    Path("val.jsonl").write_text("\n")
    assert faults(loaded_tokenizer, **options)[0].what == "dataset.eval_path=val.jsonl"
    write(Path("val.jsonl"), [GOOD, {"instruction": "a" * 40 + "!", "output": "a"}])
    monkeypatch.setattr("sft.limits.SECONDS", 0.2)
    (endless,) = faults(loaded_tokenizer, **options, drop={"instruction": "^(a+)+$"})
    assert endless.what == "dataset.drop.instruction=^(a+)+$ at held-out row 2 of val.jsonl"


def test_a_column_of_the_held_out_rows_alone_does_not_vanish(loaded_tokenizer, shards):
    write(Path("val.jsonl"), [row | {"context": "c", "id": 1} for row in rows_of(20)])
    options = {"path": "shards", "eval_path": "val.jsonl", "template": "chat"}
    with pytest.raises(Refusal, match="Its column 'context' carries meaning and is not used"):
        prepared(loaded_tokenizer, **options)
    found = prepared(loaded_tokenizer, **options, ignore_columns=["context"])
    assert found.facts["notes"]["column id"] == {"count": 1, "first": 1, "held_out": True}
    write(Path("more.jsonl"), [row | {"context": "c"} for row in rows_of(5, 6)])
    others = {"path": "more.jsonl", "eval_path": "shards", "template": "chat"}
    assert len(prepared(loaded_tokenizer, **others, ignore_columns=["context"]).eval) == 4
    with pytest.raises(Refusal, match="has no column 'contexts'"):
        prepared(loaded_tokenizer, **others, ignore_columns=["contexts"])


def test_tokens_are_kept_by_the_held_out_rows_too_and_not_by_their_name(loaded_tokenizer, shards, monkeypatch):
    made, make = [], data_prepare._tokenise_all
    monkeypatch.setattr(data_prepare, "_tokenise_all", lambda *args: made.append(1) or make(*args))
    write(Path("val.jsonl"), rows_of(20))
    prepared(loaded_tokenizer, path="shards", eval_path="val.jsonl")
    Path("val.jsonl").rename("other.jsonl")
    again = prepared(loaded_tokenizer, path="shards/*", eval_path="other.jsonl")
    assert len(made) == 1 and again.facts["eval_source"] == "other.jsonl" and len(again.eval) == 1
    write(Path("other.jsonl"), rows_of(21))
    assert prepared(loaded_tokenizer, path="shards", eval_path="other.jsonl").eval[0]["reference"] == "Answer 21"
    assert len(made) == 2


def test_eval_path_works_beside_a_data_set_of_the_hub_and_the_shipped_one(loaded_tokenizer, monkeypatch):
    write(Path("val.jsonl"), rows_of(20))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: Dataset.from_list(rows_of(1, 2, 3)))
    found = prepared(loaded_tokenizer, name="a/b", eval_path="val.jsonl")
    assert len(found.train) == 3 and [row["reference"] for row in found.eval] == ["Answer 20"]
    assert prepared(loaded_tokenizer, eval_path="val.jsonl").facts["rows"]["eval"] == 1


def test_eval_path_is_known_wherever_held_out_rows_are_asked_for(monkeypatch):
    write(Path("val.jsonl"), rows_of(20))
    argv = ["dataset.eval_path=val.jsonl", "dataset.eval_fraction=0", "trainer.early_stopping_patience=2"]
    check_command_line(ROOT / "conf", argv, False)
    assert not [line for line in warnings_for(make_settings(*argv)) if "held out" in line]
    monkeypatch.setattr("sft.sweep.checks._installed", lambda plugin: True)
    search = ["sweep=tpe", "dataset.eval_fraction=0"]
    with pytest.raises(Refusal, match="nothing would be held out"):
        check_command_line(ROOT / "conf", search, True)
    check_command_line(ROOT / "conf", [*search, "dataset.eval_path=val.jsonl"], True)


def test_a_fraction_beside_eval_path_is_said_to_be_ignored_where_it_is_not_the_default():
    write(Path("val.jsonl"), rows_of(20))
    ignored = "dataset.eval_fraction=0.3 is ignored: dataset.eval_path names the held-out rows."
    assert ignored in warnings_for(make_settings("dataset.eval_path=val.jsonl", "dataset.eval_fraction=0.3"))
    assert not [w for w in warnings_for(make_settings("dataset.eval_path=val.jsonl")) if "eval_fraction" in w]


def test_held_out_rows_come_from_one_place():
    write(Path("val.jsonl"), rows_of(20))
    problem = problem_of("dataset.name=a/b", "dataset.eval_path=val.jsonl", "dataset.eval_split=test")
    assert "one place only" in problem.why
    settings_after(problem.fix, "dataset.name=a/b", "dataset.eval_path=val.jsonl", "dataset.eval_split=test")
    assert problem_of("dataset.eval_path=vol.jsonl").fix == "dataset.eval_path=val.jsonl"
    assert "looked in" in problem_of("dataset.path=val.jsonl", "dataset.eval_path=vol.jsonl").fix, "it is trained on"


@pytest.mark.parametrize("split", ["splits/validation.jsonl", "validation", "dev"])
def test_eval_split_of_a_local_file_is_hinted_at_as_eval_path(split):
    write(Path("splits/train.jsonl"), rows_of(0))
    write(Path("splits/validation.jsonl"), rows_of(1))
    argv = ["dataset.path=splits/train.jsonl", f"dataset.eval_split={split}"]
    problem = problem_of(*argv)
    data = settings_after(problem.fix, *argv).dataset
    assert data.eval_path == (None if split == "dev" else "splits/validation.jsonl")
    assert "dataset.eval_path=" in problem.fix


# --------------------------------------------------------------------------------------------------- runs and records


def test_the_hash_of_settings_with_one_file_is_what_it_was():
    assert config_hash(make_settings("dataset.path=my_data.jsonl")) == "6b8b2645c549a575"
    assert config_hash(make_settings("dataset=local", "dataset.path=a/b.csv")) == "4eea067696a84758"
    write(Path("val.jsonl"), rows_of(20))
    assert config_hash(make_settings("dataset.eval_path=val.jsonl")) != config_hash(make_settings())


def test_a_list_of_files_leaves_no_folder_of_this_machine_on_a_card():
    command = "python train.py 'dataset.path=[/home/me/a b/x.jsonl, \"/home/me/y.jsonl\"]' dataset.eval_path=/home/me/v.jsonl"
    assert _public_command(command) == "python train.py 'dataset.path=[x.jsonl, \"y.jsonl\"]' dataset.eval_path=v.jsonl"


def test_a_run_on_shards_keeps_what_it_read_and_holds_out_what_it_was_told(small, shards):
    from sft.lifecycle import run

    write(Path("val.jsonl"), rows_of(20, 21))
    quick = ("trainer.max_steps=2", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1")
    settings = small(*quick, "dataset.path=shards", "dataset.eval_path=val.jsonl", "dataset.eval_fraction=0", "export=none")
    result = run(settings, Path("run"), Context("name", "python train.py", (), ()))
    assert (result.status, result.exit_code) == ("finished", 0)
    record = json.loads(Path("run/run.json").read_text())
    data = record["data"]
    assert (data["source"], data["eval_source"], data["eval_rows"]) == ("shards (3 files)", "val.jsonl", 2)
    assert data["files"] == [f"shards/part-{n}.jsonl" for n in (1, 2, 10)] and record["metrics"]["eval_loss"] > 0
    held_out = [json.loads(line) for line in Path("run/held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 2
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert {line["source"] for line in samples} == {"held_out"} and {line["reference"] for line in samples} == {
        "Answer 20",
        "Answer 21",
    }
