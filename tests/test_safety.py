"""Hostile models and hostile texts: no code of a model folder is run unasked, no pickle is read, and text stays text.

Each model folder here would write a marker file if its code or its pickle were run.
"""

import json
import logging
import os
import pickle
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils as modules
from peft import LoraConfig

from sft import console
from sft.cli import leaderboard as leaderboard_command
from sft.cli import preview
from sft.config.rules import check_settings
from sft.config.schema import DatasetSettings, Settings
from sft.console import ConsoleHandler, LogFile
from sft.data.prepare import prepare
from sft.errors import Problem, Refusal, first_line, last_line, refuse
from sft.export import merge
from sft.launch import ranks
from sft.model import loading, tokenizer
from sft.model.builtin import local_model
from sft.plan.plan import Plan
from sft.preflight import checks, findings, show
from sft.report import page as report_page
from sft.runs.failures import log_failure, reason_of
from sft.runs.record import Context
from sft.sanitize import shown, without_passwords
from sft.sweep import leaderboard
from sft.sweep.report import write_sweep_report
from tests.conftest import ROOT, make_settings
from tests.report.test_page import Page
from tests.sweep.test_sweep import sweep  # noqa: F401


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code_was_run"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the tiny random model, to be spoilt. Whoever asks on the terminal fails."""
    place = tmp_path / "model"
    shutil.copytree(local_model("tiny_random"), place)
    place.chmod(0o755)

    def no_questions(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", no_questions)
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return place


def change(file: Path, **facts) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **facts}), encoding="utf-8")


def settings_of(folder: Path, *overrides: str) -> Settings:
    return make_settings(f"model.name={folder}", "model.backend=transformers", *overrides)


# ---------------------------------------------------------------------------------------------------- code of a model


def add_code(folder: Path, marker: Path, kind: str) -> None:
    """Code that writes the marker, called for by one of the folder's files."""
    code = f"open({str(marker)!r}, 'w').close()\nraise SystemExit('run')\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    if kind == "config":
        names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        change(folder / "config.json", model_type="evil", architectures=["Evil"], auto_map=names)
    elif kind == "tokenizer":
        names = {"AutoTokenizer": [None, "evil.Tokenizer"]}
        change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=names)
    else:
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")


def load_all(settings: Settings) -> None:
    tokenizer.load_tokenizer(settings.model)
    loading.load_model(settings, Plan())


@pytest.mark.parametrize("kind", ["config", "tokenizer", "generate"])
def test_code_of_a_model_is_run_only_if_asked_for(folder, marker, kind):
    add_code(folder, marker, kind)
    if kind == "generate":
        with suppress(Refusal):  # this transformers takes the model without that code
            load_all(settings_of(folder))
    else:
        with pytest.raises(Refusal) as refusal:
            load_all(settings_of(folder))
        text = str(refusal.value)
        assert f"model.name={folder}" in text and "Python code of its own" in text and "model.trust_remote_code=true" in text
    assert not marker.exists()
    with suppress(Exception, SystemExit):
        load_all(settings_of(folder, "model.trust_remote_code=true"))
    assert marker.exists(), "else this test would prove nothing"


def test_code_of_a_model_is_refused_before_anything_is_trained(folder, marker):
    add_code(folder, marker, "config")
    found = findings.Found()
    assert checks.read_dims(found, settings_of(folder)) is None
    assert any("trust_remote_code=true" in problem.fix for problem in found.problems) and not marker.exists()


# ------------------------------------------------------------------------------------------------------------- pickle


class Makes:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def write_pickle(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Makes(marker), protocol=2))
    with suppress(Exception):
        torch.load(file, weights_only=False)
    assert marker.exists(), "the file is as bad as it should be"
    marker.rmdir()


def test_a_model_that_is_only_a_pickle_is_refused(folder, marker):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_pickle(folder / "pytorch_model.bin", marker)
    (problem,) = [p for p in check_settings(settings_of(folder)) if "model.name" in p.what]
    assert "no weights as safetensors" in problem.why and "can run code" in problem.why
    with pytest.raises(Refusal, match="no weights as safetensors"):
        loading.load_model(settings_of(folder), Plan())
    with pytest.raises(OSError, match="safetensors"):
        merge.load_merged(folder, torch.float32)
    assert not marker.exists()


def test_a_folder_with_the_number_of_an_http_error_in_its_name_is_not_taken_for_a_gated_model(folder, marker, tmp_path):
    named = folder.rename(tmp_path / "step-403")
    for file in named.glob("*.safetensors"):
        file.unlink()
    write_pickle(named / "pytorch_model.bin", marker)
    with pytest.raises(Refusal, match="no weights as safetensors"):
        loading.load_model(settings_of(named), Plan())


def test_a_pickle_beside_safetensors_is_left_alone(folder, marker):
    write_pickle(folder / "pytorch_model.bin", marker)
    assert not check_settings(settings_of(folder), hardware=False)
    assert loading.load_model(settings_of(folder), Plan())[0] is not None and not marker.exists()


def test_an_adapter_that_is_only_a_pickle_is_refused(folder, tmp_path, marker):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(adapter)
    write_pickle(adapter / "adapter_model.bin", marker)
    with pytest.raises(Refusal, match=r"holds no adapter_model\.safetensors"):
        merge.load_trained(settings_of(folder), adapter)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------ hostile texts

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\r\x08\x00[/bold]</script><script>alert(1)</script>"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def assert_plain(text: str) -> None:
    """Nothing that a terminal obeys, but line breaks and tabs."""
    assert not RAW.search(text), repr(RAW.search(text))


def test_what_is_printed_of_a_refusal_is_plain():
    text = str(refuse(f"dataset.path={EVIL}", f"It has no column {EVIL}.\nIt has: a", EVIL))
    assert_plain(text)
    assert "\\x1b[2J" in text and "</script>" in text and "\nIt has" not in text and "It has: a" in text


def test_what_is_logged_is_plain_on_the_terminal_and_in_the_log(tmp_path, capsys):
    log = logging.Logger("test")
    handlers = [ConsoleHandler(), LogFile(tmp_path / "train.log", encoding="utf-8")]
    for handler in handlers:
        log.addHandler(handler)
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        log.warning("Data   %s", EVIL, exc_info=True)
        log_failure(error, tmp_path)
    for handler in handlers:
        handler.close()
    written = (tmp_path / "train.log").read_bytes().decode()
    for text in (written, capsys.readouterr().err):
        assert_plain(text)
        assert "owned" in text
    assert "Traceback" in written


@pytest.fixture
def hostile_file(tmp_path, monkeypatch):
    """A data file with a hostile name, hostile columns and hostile cells."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"{EVIL.replace('/', '').replace(chr(0), '')}.jsonl"
    rows = [{"instruction": f"{EVIL} {i}", "output": f"{EVIL} {i}", EVIL: EVIL} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"instruction": "q", "output": ""}])), encoding="utf-8")
    return DatasetSettings(path=str(path), eval_fraction=0.0)


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_preview_of_hostile_rows_is_plain(hostile_file, template, loaded_tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda *given: loaded_tokenizer)
    hostile_file.template = template
    preview.show(Settings(dataset=hostile_file))
    out = capsys.readouterr().out
    assert_plain(out)
    assert "\\x1b[2J" in out and "[/bold]</script>" in out and "owned" in out


def test_what_the_check_alone_shows_is_plain(hostile_file, loaded_tokenizer, capsys):
    settings = Settings(dataset=hostile_file)
    found = findings.Found(*loaded_tokenizer, prepared=prepare(settings, *loaded_tokenizer))
    checks.check_data(found, settings)
    found.warn("Data", EVIL, EVIL)
    found.refuse("Data", [Problem(EVIL, EVIL, EVIL)])
    show.show(found)
    out = capsys.readouterr().out
    assert_plain(out)
    assert out.count("owned") > 10


def test_a_refusal_of_hostile_rows_is_plain(hostile_file, loaded_tokenizer):
    hostile_file.columns.output = "nothing"
    with pytest.raises(Refusal) as refusal:
        prepare(Settings(dataset=hostile_file), *loaded_tokenizer)
    assert_plain(str(refusal.value))
    assert "\\x1b[2J" in str(refusal.value)


def test_a_leaderboard_of_hostile_runs_is_plain_and_its_report_text(sweep, capsys):  # noqa: F811
    jobs = [(f"lora.r={r} tracking.name=x{r}", float(r)) for r in (8, 16)] + [("lora.r=32", None)]
    place = sweep(jobs)
    index = json.loads((place / "sweep.json").read_text(encoding="utf-8"))
    for job in index["jobs"]:
        job["overrides"] |= {"tracking.name": f"{EVIL}{job['number']}", f"{EVIL}.{EVIL}": f"{job['number']}"}
        job["reason"] = EVIL
    index["jobs"][2]["folder"] = 'javascript:alert(1)"><script>'
    (place / "sweep.json").write_text(json.dumps({**index, "command": EVIL}), encoding="utf-8")
    assert leaderboard_command.main([f"run={place}"]) == 0
    leaderboard.show(place)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert_plain(text)
        assert "\\x1b[2J" in text and "[/bold]</script>" in text
    page = Page(write_sweep_report(leaderboard.read_leaderboard(place)).read_text(encoding="utf-8"))
    assert len(page.scripts) == 3 and not any("alert" in script for script in page.scripts[1:])
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(link.startswith("#") or (":" not in link and link.endswith("/report.html")) for link in links), links


def test_links_in_a_report_lead_nowhere_but_into_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    url = "javascript:alert(1)"
    run = {"name": "../../x", "command": url, "tracking": {"url": url, "sync": url}, "artifacts": {url: url},
           "data": {"source": url}, "model": {"name": url, "source": url}}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    page = Page(report_page.write_report(tmp_path).read_text(encoding="utf-8"))
    assert url in page.text
    assert all(attributes.get(name, "#").startswith("#") for _, attributes in page.tags for name in ("href", "src", "action"))


def test_addresses_are_shown_without_their_password():
    text = "at http://me:hunter2@proxy:80/x?a=b@c and https://token@host, mail me@host or ssh git@host:x"
    expected = "at http://...@proxy:80/x?a=b@c and https://...@host, mail me@host or ssh git@host:x"
    assert without_passwords(text) == expected
    assert first_line(OSError(text)) == last_line(OSError(text)) == expected and "hunter2" not in reason_of(OSError(text))
    assert console.safe(f"\x1b{text}") == f"\\x1b{expected}" and "hunter2" not in str(refuse(text, text, text))


@pytest.mark.parametrize("text", ["Why?", "你好\t😀👩‍👩‍👧\n", "עברית", "a\u3000b\u200db"])
def test_plain_texts_of_all_languages_stay_as_they_are(text):
    assert shown(text) == text


class Gone:
    """The stderr of a terminal that was closed."""

    def write(self, text):
        raise OSError(5, "Input/output error")

    flush = write


def test_a_terminal_that_is_gone_changes_no_ending(monkeypatch, tmp_path):
    """Whatever is said at the end of a run, of its ranks or its jobs is said by `console.say`."""
    monkeypatch.setattr(sys, "stderr", Gone())
    console.say("Failed: rank 1")
    assert ranks._failed(tmp_path, Context(name="run"), 1, -9).exit_code == 1
    said = [p for p in (ROOT / "sft").rglob("*.py") if "file=sys.stderr" in p.read_text(encoding="utf-8")]
    assert [p.name for p in said] == ["console.py"]
