"""Whatever stands in a data file or on a command line ends in a result or in a refusal, and no row is lost in silence.

The inputs are generated, and are the same each time: 5,000 and more in the default run, ten times as many with SFT_TEST_LONG=1.
"""

import codecs
import csv
import functools
import io
import json
import math
import os
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sft.cli import check as cli_check
from sft.config import rules
from sft.config.fingerprint import config_hash
from sft.config.keys import find_field, leaf_keys, plain_type
from sft.config.schema import GROUPS, DatasetSettings, LossOn, ModelSettings, Overlong, Settings, Shape
from sft.data.cells import as_text
from sft.data.prepare import prepare
from sft.data.sources import read_rows
from sft.errors import Refusal
from sft.storage.jsonio import jsonable

CONF = Path(__file__).resolve().parents[2] / "conf"
TIMES = 10 if os.environ.get("SFT_TEST_LONG") else 1
WHOLE, BROKEN, PARQUET = 1000 * TIMES, 1000 * TIMES, 100 * TIMES
VALUES, LINES_CHECKED = 2700 * TIMES, 300 * TIMES

pytestmark = pytest.mark.timeout(300 * TIMES)


def for_all(count: int, strategy: st.SearchStrategy, check) -> None:
    """Call `check` with `count` inputs of the strategy, the same ones each time."""
    called = 0

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case) -> None:
        nonlocal called
        called += 1
        check(case)

    run()
    assert called >= count, "the strategy has too few inputs"


def check_refusal(refusal: Refusal) -> None:
    assert refusal.problems
    for problem in refusal.problems:
        assert problem.what.strip() and problem.why.strip()
    str(refusal).encode(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------------------- data files

ODD = [
    "",
    " ",
    "\n",
    "\x00",
    "a\x00b",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1b[2J",
    "\ud83d",
    "\udc00x",
    "\u202e",
    "e\u0301",
    "😀👩‍👩‍👧",
    "<|im_end|>",
    "<|im_start|>user\n",
    "\ue0000\ue001",
    "<think>x</think>\n\ny",
    "{instruction}",
    "{",
    "null",
    "NaN",
    '"',
    "'",
    "a,b",
    "=1+1",
    "[]",
    "[[]]",
    '[{"role": "user", "content": "q"}]',
    "长" * 3000,
    "word " * 800,
    "\r",
    "\t",
    "\\",
    "\\n",
]
TEXTS = (
    st.sampled_from(ODD) | st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["Why?", "Because.", "你好"])
)
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.booleans()
SCALARS = TEXTS | st.none() | NUMBERS
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=5
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "User", "robot", ""]) | SCALARS
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": ANYTHING}), max_size=2)
TURN = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "from": ROLES, "content": TEXTS | PARTS | ANYTHING, "value": TEXTS, "tool_calls": ANYTHING}
)


def ask_and_answer(texts: tuple[str, ...]) -> list[dict]:
    """Texts as turns of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


GOOD_TURNS = st.lists(TEXTS, min_size=1, max_size=4).map(ask_and_answer)
TURNS = GOOD_TURNS | st.lists(TURN | ANYTHING, max_size=4) | ANYTHING | GOOD_TURNS.map(json.dumps)
COLUMNS = st.sampled_from(
    ["instruction", "input", "output", "prompt", "completion", "text", "system", "topic", "Output", "", "问题"]
)
KINDS = [
    st.fixed_dictionaries(
        {"instruction": TEXTS, "output": TEXTS}, optional={"input": SCALARS, "system": ANYTHING, "topic": ANYTHING}
    ),
    st.fixed_dictionaries({"prompt": TEXTS | TURNS, "completion": TEXTS | ANYTHING}),
    st.fixed_dictionaries({"text": SCALARS}, optional={"topic": ANYTHING}),
    st.fixed_dictionaries({"messages": TURNS}, optional={"system": SCALARS}),
    st.fixed_dictionaries({"conversations": TURNS}),
    st.fixed_dictionaries({"messages": GOOD_TURNS}),
    st.dictionaries(COLUMNS | TEXTS, ANYTHING, max_size=4),
]
# Rows of which most can be learnt from, so that what is counted afterwards is tested too.
SAID = st.sampled_from(["Why?", "Because.", "你好", "", " ", "long " * 60, "<|im_end|>", "{output}", "\x00", "😀"])
TAME = [
    st.fixed_dictionaries({"instruction": SAID, "output": SAID}, optional={"input": SAID, "topic": ANYTHING}),
    st.fixed_dictionaries({"prompt": SAID, "completion": SAID}),
    st.fixed_dictionaries({"text": SAID}),
    st.fixed_dictionaries({"messages": st.tuples(SAID, SAID).map(ask_and_answer)}),
]


def lists_of(kinds: list[st.SearchStrategy]) -> st.SearchStrategy:
    """Rows of one kind each time."""
    return st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=1, max_size=6))


ROWS = lists_of(TAME) | lists_of(TAME) | lists_of(KINDS) | st.lists(st.one_of(KINDS), min_size=1, max_size=4)
FLAT = COLUMNS.flatmap(lambda _: st.lists(COLUMNS, min_size=1, max_size=4, unique=True)).flatmap(
    lambda names: st.lists(
        st.tuples(*[TEXTS.filter(_is_unicode)] * len(names)).map(lambda cells: dict(zip(names, cells, strict=True))),
        min_size=1,
        max_size=6,
    )
)


def _is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def write_json(rows: list[dict], style: int) -> tuple[str, bytes]:
    text = json.dumps(rows if style % 2 else {"version": 1, "data": rows}, indent=style % 3 or None)
    return ".json", codecs.BOM_UTF8 * (style % 5 == 0) + text.encode()


def write_jsonl(rows: list[dict], style: int) -> tuple[str, bytes]:
    end = ("\n", "\r\n", "\n\n", "\n \t\n")[style % 4]
    plain = style % 3 == 0 and _is_unicode("".join(json.dumps(row, ensure_ascii=False) for row in rows))
    text = end.join(json.dumps(row, ensure_ascii=not plain) for row in rows) + end * (style % 2)
    return ".jsonl", codecs.BOM_UTF8 * (style % 5 == 0) + text.encode()


def write_csv(rows: list[dict], style: int) -> tuple[str, bytes]:
    file = io.StringIO(newline="")
    end = ("\n", "\r\n")[style % 2]
    bare = any("\r" in cell for row in rows for cell in row.values())  # Python's writer leaves it without quotes
    writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if bare or style % 3 else csv.QUOTE_MINIMAL)
    writer.writerow(list(rows[0]))
    for number, row in enumerate(rows):
        writer.writerow(list(row.values()))
        file.write(end * (number % 2 and style % 7 == 0))
    return ".csv", codecs.BOM_UTF8 * (style % 5 == 0) + file.getvalue().encode()


STYLES = st.integers(0, 420)
FILES = st.tuples(ROWS, st.sampled_from([write_json, write_jsonl]), STYLES) | st.tuples(FLAT, st.just(write_csv), STYLES)
COUNTED = {
    "max_rows": st.integers(1, 6),
    "max_eval_rows": st.integers(1, 3),
    "shuffle": st.booleans(),
    "loss_on": st.sampled_from(LossOn),
    "system_prompt": st.just("Be brief."),
}
SHAPED = {
    "shape": st.sampled_from(Shape),
    "template": st.sampled_from(["auto", "chat", "alpaca", "plain", "Q: {instruction}\nA: {output}"]),
    "keep": st.dictionaries(COLUMNS, st.sampled_from([".", "^$", "a"]), max_size=1),
    "drop": st.dictionaries(COLUMNS, st.sampled_from(["Why", "^x", "null"]), max_size=1),
}
FILTERS = {"drop": st.sampled_from([{"output": "^$"}, {"instruction": "Why"}, {"text": "😀"}, {"prompt": "long"}])}
POLICY = {"overlong": st.sampled_from(Overlong), "eval_fraction": st.sampled_from([0.0, 0.0, 0.1, 0.5])}
OPTIONS = st.one_of([st.fixed_dictionaries(POLICY, optional=COUNTED | more) for more in ({}, FILTERS, SHAPED)])
LENGTHS = st.sampled_from([2048, 2048, 64, 40, 8])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for the files and the tokens. What takes time and is tested elsewhere is left out: fsync, a big hash."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return tmp_path


@pytest.fixture
def tokeniser(loaded_tokenizer, monkeypatch):
    """The tokenizer, whose 2 MB of text, by which a cache is known, are written once and not for every input."""
    tokenizer, stop_ids = loaded_tokenizer
    whole = tokenizer.backend_tokenizer.to_str()

    class Quick:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def to_str(self):
            return str(len(whole))

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda self: Quick(self._tokenizer)))
    return tokenizer, stop_ids


def follow_rows(path: Path, options: dict, length: int, tokeniser) -> tuple[list[dict] | None, bool]:
    """(the rows that were read, or None for a refusal; whether they became tokens).

    Every one of them is trained on, held out, or counted as left out.
    """
    data = DatasetSettings(path=str(path), **options)
    rows = None
    try:
        rows = list(read_rows(data, "train")[0])
        prepared = prepare(Settings(model=ModelSettings(max_seq_length=length), dataset=data), *tokeniser)
    except Refusal as refusal:
        check_refusal(refusal)
        return rows, False
    facts, counts = prepared.facts, prepared.facts["rows"]
    assert counts["read"] == len(rows)
    passing = [row for row in rows if _passes(row, data)]
    assert counts["filtered"] == len(rows) - len(passing)
    used = len(passing[: data.max_rows])
    assert used == counts["train"] + counts.get("eval", 0) + facts["dropped_rows"] + facts["rows_without_labels"]
    splits = [split for split in (prepared.train, prepared.eval) if split is not None]
    assert [len(split) for split in splits] == [counts[name] for name in ("train", "eval") if name in counts]
    numbers = [number for split in splits for number in split["row"]]
    assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(1, len(rows) + 1))
    for split in splits:
        for entry in split:
            assert 0 < len(entry["input_ids"]) == len(entry["labels"]) <= length
    json.dumps(facts, ensure_ascii=False).encode()
    return rows, True


def _passes(row: dict, data: DatasetSettings) -> bool:
    kept = all(re.search(pattern, as_text(row.get(column)), re.S) for column, pattern in data.keep.items())
    return kept and not any(re.search(pattern, as_text(row.get(column)), re.S) for column, pattern in data.drop.items())


def test_whole_files_are_read_row_for_row(folder, tokeniser):
    trained = []

    def check(case) -> None:
        (rows, write, style), options, length = case
        suffix, content = write(rows, style)
        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        found, tokenised = follow_rows(path, options, length, tokeniser)
        trained.append(tokenised)
        if found is not None:
            assert found == (rows if suffix != ".csv" else [{k.strip(): v for k, v in row.items()} for row in rows])

    for_all(WHOLE, st.tuples(FILES, OPTIONS, LENGTHS), check)
    assert sum(trained) > 0.2 * WHOLE, "enough of them reach the counts"


def _mangle(case) -> bytes:
    """A whole file with something cut out, doubled, put in, or in another encoding."""
    (rows, write, style), at, how, odd = case
    content = write(rows, style)[1]
    at = at % (len(content) + 1)
    return [
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + odd + content[at:],
        lambda: content[:at] + content[at + 1 :],
        lambda: content + content,
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: content.decode(errors="replace").encode("gb18030"),
        lambda: content.decode(errors="replace").encode("latin-1", errors="replace"),
        lambda: content.replace(b"\\n", b"\n"),
        lambda: content.replace(b'"', b"'"),
    ][how]()


PIECES = [
    b"\x00",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\xbd",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\n",
    b"\r",
    b"\\u",
    b"\\ud800",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'{"a": 1}',
    b"null",
    b";",
    b"\t",
    b"PAR1",
]
RANDOM = st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
DAMAGED = st.tuples(FILES, st.integers(0, 5000), st.integers(0, 9), RANDOM).map(_mangle) | RANDOM
SUFFIXES = st.sampled_from([".json", ".jsonl", ".csv", ".JSONL"])


def test_broken_files_are_read_or_refused(folder, tokeniser):
    def check(case) -> None:
        content, suffix, options, length = case
        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        follow_rows(path, options, length, tokeniser)

    for_all(BROKEN, st.tuples(DAMAGED, SUFFIXES, OPTIONS, LENGTHS), check)


CELLS = {
    pa.string(): TEXTS.filter(_is_unicode) | st.none(),
    pa.int64(): st.integers(-(2**60), 2**60) | st.none(),
    pa.float64(): st.floats() | st.none(),
    pa.bool_(): st.booleans() | st.none(),
    pa.binary(): st.binary(max_size=5) | st.none(),
    pa.timestamp("s"): st.datetimes() | st.none(),
    pa.list_(pa.string()): st.lists(TEXTS.filter(_is_unicode), max_size=2) | st.none(),
    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])): GOOD_TURNS.filter(
        lambda t: _is_unicode(json.dumps(t, ensure_ascii=False))
    )
    | st.none(),
    pa.null(): st.none(),
}


@st.composite
def tables(draw) -> tuple[pa.Table, bytes]:
    """A table of up to five columns, and its parquet file."""
    names = draw(st.lists(COLUMNS.filter(bool) | st.just("messages"), min_size=1, max_size=5, unique=True))
    kinds = [draw(st.sampled_from([pa.string()] * 4 + list(CELLS))) for _ in names]
    rows = draw(st.integers(0, 5))
    arrays = [pa.array(draw(st.lists(CELLS[kind], min_size=rows, max_size=rows)), kind) for kind in kinds]
    file, table = io.BytesIO(), pa.table(arrays, names)
    pq.write_table(table, file, row_group_size=2)
    return table, file.getvalue()


def test_parquet_files_are_read_row_for_row_or_refused(folder, tokeniser):
    def check(case) -> None:
        (table, content), cut, options, length = case
        path = folder / "rows.parquet"
        path.write_bytes(content[:-cut] if cut else content)
        found, _ = follow_rows(path, options, length, tokeniser)
        assert found is None or len(found) == len(table)
        assert found is not None or cut or not len(table)

    cuts = st.sampled_from([0, 0, 0, 1, 8, 100])
    for_all(PARQUET, st.tuples(tables(), cuts, OPTIONS, LENGTHS), check)


# ------------------------------------------------------------------------------------------------------------- settings

KEYS = leaf_keys()
NAMES = (
    st.sampled_from(ODD)
    | st.text(st.characters(codec="utf-8"), max_size=12)
    | st.sampled_from(
        [
            "auto",
            "~",
            "~no_such_user/x",
            "/",
            ".",
            "..",
            "../../x",
            "a/b",
            "x" * 300,
            "/" + "y/" * 3000,
            "rows.jsonl",
            "rows.csv/",
            "q_proj",
            "None",
            "17:30",
            "99:99",
            "2026-12-31 17:30",
            "{output}",
            "{instruction!r:>5}{output}",
            "(",
            "[a-",
            "(?P<",
            "adamw_8bit",
            "cosine",
            "user/name",
            "https://huggingface.co/user/name",
            "--",
            "q8_0",
            "adapter",
            "gguf",
        ]
    )
)
FLOATS = st.floats() | st.sampled_from([0.0, 0.5, 1.0, 2e-4, 1e308, 5e-324]) | st.integers(-3, 10**6).map(float)
INTS = st.integers() | st.integers(-2, 64)


def values_of(kind) -> st.SearchStrategy:
    """Values of a setting's declared type."""
    text = str(kind)
    if hasattr(kind, "__members__"):
        return st.sampled_from(kind)
    plain = {
        "<class 'int'>": INTS,
        "<class 'float'>": FLOATS,
        "<class 'bool'>": st.booleans(),
        "<class 'str'>": NAMES,
        "list[str]": st.lists(NAMES, max_size=3),
        "dict[str, str]": st.dictionaries(NAMES, NAMES, max_size=2),
        "dict[str, typing.Any]": st.dictionaries(
            NAMES | st.sampled_from(["packing", "neftune_noise_alpha", "bf16"]), ANYTHING, max_size=2
        ),
        "int | str": INTS | NAMES,
        "typing.Any": st.none() | NAMES | st.lists(NAMES, max_size=3) | ANYTHING,
    }
    if text in plain:
        return plain[text]
    return st.none() | st.one_of([values_of(k) for k in kind.__args__ if k is not type(None)])


@st.composite
def changed_settings(draw) -> Settings:
    """Settings with up to three values that the schema would take."""
    made = Settings()
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        cls, name = find_field(key)
        place = functools.reduce(getattr, key.split(".")[:-1], made)
        setattr(place, name, draw(values_of(plain_type(cls, name))))
    return made


def test_settings_are_good_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(made: Settings) -> None:
        problems = rules.check_settings(made, hardware=bool(made.seed % 2))
        if problems:
            check_refusal(Refusal(problems))
            return
        for value in (functools.reduce(getattr, key.split("."), made) for key in KEYS):
            assert not isinstance(value, float) or math.isfinite(value)
        assert all(rules.warnings_for(made)) or not rules.warnings_for(made)
        assert len(config_hash(made)) == 16 and json.dumps(jsonable(made), allow_nan=False)

    for_all(VALUES, changed_settings(), check)


# -------------------------------------------------------------------------------------------------------- command lines

LINE = """
lora.r=8 lora.r=8,16 lora.r=x lora.rr=8 r = == -m --multirun -h --cfg job --cfg=all --info -c -cn -cd --config-dir
--config-name=x --config-path --package -p --resolve --hydra-help --version --run --experimental-rerun --shell-completion
-sc -- ---x model=tiny_random model= model=null dataset=local experiment=chat experiment=colab_notebook sweep=lr sweep=tpe
sweep=seeds +lora.r=1 ++lora.r=1 ~lora.r ~lora ~model=x lora@model=r8 trainer.extra.packing=true +trainer.extra={}
hydra.run.dir=out hydra.run.dir=${x} hydra.run.dir=[ hydra/launcher=ray hydra/launcher=nothing hydra.sweeper=x hydra=x
hydra.verbose=true +hydra.x=1 hydra.job.name=x resume= resume=null resume=x resume=. preflight.mode=only seed=${lora.r}
seed=${nothing} seed=${ seed=${now:} seed=${oc.env:HOME} tracking.name=${oc.env:HOME} seed=??? lora.r=range(1,4)
lora.r=choice(1,2) lora.r=shuffle(1,2) lora.lora_dropout=interval(0,1) lora.r=tag(a,1) lora.r=sort(3,1) lora.r=glob(*)
lora=glob(*) model=choice(a,b) lora.r=int(8.5) lora.r=float(x) lora.r=range(0,0) sweep.paired=[lora.r,seed] a.b.c=1 lora.=1
dataset.path=[a,b] dataset.path={a:1} dataset.path=[[a]] dataset.path=1 dataset.eval_path=*
.r=1 lora..r=1 dataset.columns=x dataset.columns.output=null
"""
WORDS = [
    *LINE.split(),
    "hydra.run.dir=" + "x" * 300,
    "resume=" + "x" * 300,
    "resume=~no_such_user",
    "hydra.run.dir=~no_such_user/x",
    "",
    "lora={r: 8}",
    "samples={prompts: [a]}",
    "dataset.keep={a: b}",
]
SIGNS = [*"abr8,.=[]{}()'\"\\$:~+-/@ \n", "lora.r", "${", "\x00", "é", "\ud800", "😀", "null", "1e-4"]
SYNTAX = st.lists(st.sampled_from(SIGNS), max_size=8)
GUESSED = st.tuples(
    st.sampled_from(["", "+", "++", "~", "-", "--"]),
    st.sampled_from(KEYS + list(GROUPS)),
    st.sampled_from(["=", "", '="', "='", ":", ".x="]),
    NAMES | SYNTAX.map("".join) | NUMBERS.map(str),
).map("".join)
LINES = st.lists(st.sampled_from(WORDS) | GUESSED | SYNTAX.map("".join), min_size=1, max_size=3)


@pytest.fixture
def quick_hydra(monkeypatch):
    """Composes once for the same groups, and sets plain values on a copy of that, in a tenth of the time."""
    made, real = {}, cli_check.compose

    def compose(name, overrides, **options):
        plain = [
            o for o in overrides if re.fullmatch(r"(\w+\.)+\w+=[\w.]+", o) and not o.startswith(("hydra", "trainer.extra"))
        ]
        key = (name, tuple(o for o in overrides if o not in plain), str(options))
        if key not in made:
            made[key] = pickle.dumps(real(name, overrides=list(key[1]), **options))
        config = pickle.loads(made[key])
        for text in plain:
            override = OverridesParser.create().parse_override(text)
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        return config

    monkeypatch.setattr(cli_check, "compose", compose)
    monkeypatch.setattr(cli_check, "register", lambda: None)  # conftest.py did


def test_command_lines_are_good_or_refused(tmp_path, monkeypatch, quick_hydra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def check(argv: list[str]) -> None:
        try:
            cli_check.check_command_line(CONF, argv, hardware=len(argv) % 2 == 0)
        except Refusal as refusal:
            check_refusal(refusal)
        except SystemExit as end:
            assert end.code == 0 and "--version" in argv
        finally:
            GlobalHydra.instance().clear()

    for_all(LINES_CHECKED, LINES, check)


def test_the_default_run_has_over_five_thousand_inputs():
    assert (WHOLE + BROKEN + PARQUET + VALUES + LINES_CHECKED) // TIMES > 5000
