"""Reading rows, naming the line of every mistake, and choosing which rows are used."""

import json
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft.config.schema import DatasetSettings
from sft.data import readers
from sft.data.sources import choose_indices, read_rows, select
from sft.environment import hub_unreachable
from sft.errors import Refusal

ROWS = [
    {"question": "什么是\nAI？", "answer": "人工智能，“AI”。"},
    {"question": 'a, "b"', "answer": "😀\u2028x\x0by"},
    {"question": "", "answer": " c "},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(folder: Path, suffix: str, rows: list[dict]) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".json":
        return write(path, json.dumps(rows, ensure_ascii=False, indent=1))
    if suffix == ".jsonl":
        return write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    if suffix == ".csv":
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        return write(path, "\r\n".join(",".join('"' + v.replace('"', '""') + '"' for v in line) for line in lines))
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path, **options) -> list[dict]:
    return list(read_rows(DatasetSettings(path=str(path), **options), "train")[0])


def refusal_of(path: Path) -> str:
    with pytest.raises(Refusal) as refusal:
        read(path)
    return str(refusal.value)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".JSONL"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = write_rows(tmp_path, suffix.lower(), ROWS)
    path = path.rename(path.with_suffix(suffix))
    assert read(path) == ROWS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, suffix):
    path = write_rows(tmp_path, suffix, ROWS)
    write(path, b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == ROWS


@pytest.mark.parametrize(("suffix", "line"), [(".json", 3), (".jsonl", 1), (".csv", 2)])
def test_chinese_windows_encoding_is_refused_with_its_line_and_the_cure(tmp_path, suffix, line):
    path = write_rows(tmp_path, suffix, [{"question": "中文", "answer": "x"}])
    write(path, path.read_text(encoding="utf-8").encode("gb18030"))
    text = refusal_of(path)
    assert f"rows{suffix}, line {line}" in text and "not UTF-8" in text and "iconv -f GB18030" in text


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv, which the hint names")
@pytest.mark.parametrize("encoding", ["utf-16", "gb18030"])
def test_another_encoding_is_refused_with_a_command_that_mends_it(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    refusal = refusal_of(write(Path("my data.csv"), "问,a\n一,2\n".encode(encoding)))
    (hint,) = [line.partition("hint: ")[2] for line in refusal.splitlines() if "hint: iconv" in line]
    subprocess.run(hint.partition("   ")[0], shell=True, check=True)
    assert read(Path("utf8.csv")) == [{"问": "一", "a": "2"}]


def test_the_source_names_the_file_and_its_contents(tmp_path):
    one, two = write_rows(tmp_path, ".jsonl", ROWS), write_rows(tmp_path, ".json", ROWS)
    sources = [read_rows(DatasetSettings(path=str(path)), "train")[1] for path in (one, two, one)]
    assert sources[0] == sources[2] and sources[0]["name"] == str(one)
    assert len(sources[0]["hash"]) == 64 and sources[0]["hash"] != sources[1]["hash"]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path, ".jsonl", ROWS)
    assert read(Path("~/rows.jsonl")) == ROWS


def test_the_shipped_rows_are_read():
    rows, source = read_rows(DatasetSettings(), "train")
    assert len(rows) > 50 and source["name"] == "twists"


# ------------------------------------------------------------------------------------------- a row at a time


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_rows_are_found_wherever_the_file_is_cut(tmp_path, monkeypatch, suffix, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    rows = [{"q": f'{n} 问\r\n,"[{{' * (n % 4), "a": "é" * (n % 5) + "]}"} for n in range(40)]
    read = read_rows(DatasetSettings(path=str(write_rows(tmp_path, suffix, rows))), "train")[0]
    assert isinstance(read, readers.FileRows) and [read[i] for i in reversed(range(40))] == rows[::-1]
    assert list(read.column_names) == ["q", "a"]


def test_a_list_is_read_a_row_at_a_time_however_it_is_set(tmp_path):
    texts = ['[{"a":1},{"b":[2,{"c":null}]}]', ' [\n{"a" : 1}\n ,\t{"b":[2,{"c":null}]}\n]\n\n']
    for text in texts:
        read = read_rows(DatasetSettings(path=str(write(tmp_path / "x.json", text))), "train")[0]
        assert isinstance(read, readers.FileRows) and list(read) == json.loads(text)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix):
    def peak(count: int) -> int:
        path = write_rows(tmp_path, suffix, [{"q": f"{n} " + "q" * 500, "a": "a" * 500} for n in range(count)])
        tracemalloc.start()
        rows = read_rows(DatasetSettings(path=str(path)), "train")[0]
        assert sum(len(row["q"]) + len(row["a"]) for row in rows) > 1000 * count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(4000), peak(16000)  # 4 and 16 MB of text
    assert many - few < 24 * 12000 and many < 8_000_000, f"{few:,} and {many:,} bytes"


def test_json_that_cannot_be_read_is_refused(tmp_path):
    for name in ("x.json", "x.jsonl"):
        for value in ("1" * 5000, "[" * 100_000):
            assert "that cannot be read" in refusal_of(write(tmp_path / name, '{"a": 1, "b": ' + value + "}"))


# --------------------------------------------------------------------------------------------------- json, jsonl


def test_a_malformed_line_is_named(tmp_path):
    text = refusal_of(write(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": 2,}\n'))
    assert "x.jsonl, line 3" in text and "Not valid JSON" in text and "column" in text
    text = refusal_of(write(tmp_path / "x.json", '[{"a": 1},\n {"a": }]'))
    assert "x.json, line 2, column 8" in text


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [("x.json", '{"a": 1}\n{"a": 2}', "rename it to .jsonl"), ("x.jsonl", '[\n{"a": 1}\n]', "rename it to .json")],
)
def test_the_two_json_forms_taken_for_each_other(tmp_path, name, content, hint):
    assert hint in refusal_of(write(tmp_path / name, content))


def test_a_list_inside_an_object_is_found(tmp_path):
    assert read(write(tmp_path / "x.json", json.dumps({"version": 1, "data": ROWS}))) == ROWS
    text = refusal_of(write(tmp_path / "y.json", json.dumps({"train": ROWS, "test": ROWS})))
    assert "list of rows; it holds one object" in text and "hint:" in text


@pytest.mark.parametrize("content", ["5", "null", '"text"', "true"])
def test_something_else_than_a_list_is_refused(tmp_path, content):
    assert "has to hold a list of rows" in refusal_of(write(tmp_path / "x.json", content))


def test_a_row_that_is_no_object_is_named(tmp_path):
    assert "x.json, row 2" in refusal_of(write(tmp_path / "x.json", '[{"a": 1}, "b"]'))
    assert "x.jsonl, line 2" in refusal_of(write(tmp_path / "x.jsonl", '{"a": 1}\n[1, 2]'))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", "[]"),
        ("x.json", " \n"),
        ("x.jsonl", "\n \n"),
        ("x.csv", "question,answer\n"),
        ("x.csv", "\n\n"),
        ("x.json", '{"data": []}'),
    ],
)
def test_files_without_rows_are_refused(tmp_path, name, content):
    assert "holds no rows" in refusal_of(write(tmp_path / name, content))


def test_windows_line_ends_are_read(tmp_path):
    assert read(write(tmp_path / "x.jsonl", '{"a": "1"}\r\n{"a": "2"}\r\n')) == [{"a": "1"}, {"a": "2"}]
    assert read(write(tmp_path / "x.csv", "a,b\r\n1,2\r\n")) == [{"a": "1", "b": "2"}]


# ----------------------------------------------------------------------------------------------------------- csv


def test_a_wrong_number_of_columns_is_named_with_the_line_where_the_row_starts(tmp_path):
    text = refusal_of(write(tmp_path / "x.csv", 'question,answer\n"two\nlines",b\n\nhello, you,x\n'))
    assert "x.csv, line 5" in text and "2 columns are expected (question, answer); found 3" in text and "quotes" in text
    assert "found 1" in refusal_of(write(tmp_path / "x.csv", "question,answer\nhello\n"))


def test_a_quote_that_never_closes_is_named_where_it_opens(tmp_path):
    text = refusal_of(write(tmp_path / "x.csv", 'q,a\n1,2\n"open,4\n5,6\n'))
    assert "x.csv, line 3" in text and "not valid CSV" in text


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_other_separators_are_recognised(tmp_path, sign):
    text = refusal_of(write(tmp_path / "x.csv", f"question{sign}answer\n1{sign}2\n"))
    assert "separated by commas" in text and "x.csv, line 1" in text


@pytest.mark.parametrize("sign", [";", "\t", "|"])
@pytest.mark.parametrize(
    "header", ['"instruction"{}"output"', 'instruction{}"output"', '"instruction" {} output', "\ufeffinstruction{}output"]
)
def test_csv_with_another_separator_is_refused_with_a_command_that_mends_it(tmp_path, monkeypatch, sign, header):
    text = f'{header.format(sign)}\r\n"Hi, ""you""?"{sign}"Hello,\nAnn!"\r\n'
    monkeypatch.chdir(tmp_path)
    Path("my data.csv").write_text(text, encoding="utf-8", newline="")
    refusal = refusal_of(Path("my data.csv"))
    assert "my data.csv, line 1" in refusal and f"separated by {sign!r}" in refusal
    hint = next(line for line in refusal.splitlines() if "hint: python -c" in line).split("hint: python ")[1]
    subprocess.run(f"{shlex.quote(sys.executable)} {hint}", shell=True, check=True)
    (row,) = read(Path("commas.csv"))
    assert [value.strip() for value in row.values()] == ['Hi, "you"?', "Hello,\nAnn!"]


def test_a_sign_inside_quotes_is_no_separator(tmp_path):
    assert read(write(tmp_path / "x.csv", '"a;b","c|d"\n"1","2"\n')) == [{"a;b": "1", "c|d": "2"}]
    assert "written twice" in refusal_of(write(tmp_path / "x.csv", '"a;b"x,"c"\n"1","2"\n'))


def test_two_columns_of_one_name_are_refused(tmp_path):
    assert "'a' stands there twice" in refusal_of(write(tmp_path / "x.csv", "a,b,a\n1,2,3\n"))


def test_spaces_around_column_names_are_no_part_of_them(tmp_path):
    assert read(write(tmp_path / "x.csv", "a, b\n1, 2\n")) == [{"a": "1", "b": " 2"}]


def test_huge_cells_are_read(tmp_path):
    cell = "长" * 200_000
    assert read(write(tmp_path / "x.csv", f"a,b\n{cell},2\n"))[0]["a"] == cell


# ------------------------------------------------------------------------------------------------------- parquet


def test_a_damaged_parquet_file_is_refused(tmp_path):
    assert "Not a readable parquet file" in refusal_of(write(tmp_path / "x.parquet", b"PAR1 nonsense PAR1"))


def test_a_changed_parquet_file_is_read_anew(tmp_path):
    first = read(write_rows(tmp_path, ".parquet", ROWS))
    changed = [row | {"answer": "new"} for row in ROWS]
    assert first == ROWS and read(write_rows(tmp_path, ".parquet", changed)) == changed


def test_nested_parquet_columns_are_lists_of_turns(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}]
    assert read(write_rows(tmp_path, ".parquet", rows)) == rows


# ----------------------------------------------------------------------------------------------------- choosing


def choose(rows, **options) -> list[str]:
    options = {"shuffle": False, **options}
    return [rows[i]["a"] for i in choose_indices(rows, DatasetSettings(**options), 0)]


def test_filters_keep_and_drop_by_column():
    rows = [{"a": "one"}, {"a": "two\nlines"}, {"a": "three", "b": 5}, {"a": ""}]
    assert choose(rows, keep={"a": "e$"}) == ["one", "three"]
    assert choose(rows, keep={"a": "two.lines"}) == ["two\nlines"], "a dot matches line breaks too"
    assert choose(rows, drop={"a": "(?i)^T"}) == ["one", ""]
    assert choose(rows, keep={"a": ".{4,}"}, drop={"b": "5"}) == ["two\nlines"]
    assert choose(rows, keep={"b": "^$"}) == ["one", "two\nlines", ""], "a row without the column is blank there"


def test_filters_see_cells_as_templates_do():
    rows = [{"a": 0}, {"a": True}, {"a": None}, {"a": ["é"]}]
    assert choose(rows, keep={"a": "^0$"}) == [0]
    assert choose(rows, keep={"a": "^true$"}) == [True]
    assert choose(rows, keep={"a": '"é"'}) == [["é"]]


def test_filters_that_leave_nothing_are_refused():
    with pytest.raises(Refusal, match="None of the 2 rows passes"):
        select([{"a": "x"}, {"a": "y"}], DatasetSettings(keep={"a": "z"}), 0, {})


def test_shuffling_follows_the_seed():
    rows = [{"a": str(i)} for i in range(50)]
    data = DatasetSettings()
    assert choose_indices(rows, data, 1) == choose_indices(rows, data, 1) != choose_indices(rows, data, 2)
    in_order = list(choose_indices(rows, DatasetSettings(shuffle=False), 1))
    assert sorted(choose_indices(rows, data, 1)) == in_order == list(range(50))


@pytest.mark.parametrize(
    ("rows", "options", "train", "held_out"),
    [
        (100, {}, 90, 10),
        (104, {}, 94, 10),
        (105, {}, 95, 10),  # 10.5 rounds to the even number
        (106, {}, 95, 11),
        (2, {}, 1, 1),
        (100, {"eval_fraction": 0.0}, 100, 0),
        (100, {"eval_fraction": 0.5, "max_eval_rows": 7}, 93, 7),
        (100, {"max_rows": 20}, 18, 2),
        (100, {"max_rows": 500, "max_eval_rows": None, "eval_fraction": 0.3}, 70, 30),
    ],
)
def test_held_out_rows_are_counted_and_apart(rows, options, train, held_out):
    table, counts = [{"a": str(i)} for i in range(rows)], {}
    trained, kept = select(table, DatasetSettings(**options), 0, counts)
    assert (len(trained), len(kept)) == (train, held_out) and not set(trained) & set(kept)
    assert counts == {"filtered": 0}


def test_more_rows_keep_the_order_of_fewer():
    """max_rows takes the head of one shuffled order, so that a longer run contains a shorter one's rows."""
    rows = [{"a": str(i)} for i in range(30)]
    few = select(rows, DatasetSettings(max_rows=10, eval_fraction=0.0), 5, {})[0]
    assert select(rows, DatasetSettings(max_rows=20, eval_fraction=0.0), 5, {})[0][:10] == few


def test_a_single_row_cannot_be_held_out():
    with pytest.raises(Refusal, match="leaves none to train on"):
        select([{"a": "x"}], DatasetSettings(), 0, {})


# ------------------------------------------------------------------------------------------------------- the hub


def test_an_unreachable_hub_names_the_mirror_and_the_local_way():
    with pytest.raises(Refusal) as refusal:
        read_rows(DatasetSettings(name="some-owner/some-data"), "train")
    text = str(refusal.value)
    assert "dataset.name=some-owner/some-data" in text and "HF_ENDPOINT=https://hf-mirror.com" in text
    assert "dataset.path=/path/to/a/file.jsonl" in text and "https://huggingface.co" in text


def test_the_endpoint_that_was_tried_is_named(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert "https://mirror.example" in str(hub_unreachable("x", ConnectionError("no route"), "y"))
