"""--json: one JSON object on standard output and nothing else, for checks, tables, runs and the refusals of every command."""

import json
from pathlib import Path

import pytest

from sft.cli.main import WORDS, main
from sft.config.schema import LoraSettings, Settings
from sft.programs import VARIABLE
from sft.sweep.index import SweepIndex
from tests import forked
from tests.conftest import ROOT, SMALL

KEYS = {"what", "why", "fix"}

WRONG = {
    "train": ["lora.rr=8"],
    "sweep": ["lora.rr=8,16"],
    "preflight": ["lora.rr=8"],
    "resume": ["outputs/none"],
    "preview": ["lora.rr=8"],
    "init": ["goal=anwser"],
    "show": ["run=outputs/none"],
    "leaderboard": [],
    "export": ["run=outputs/none", "export=adapter"],
    "chat": ["run=outputs/none"],
    "doctor": ["torch"],
}
"""Of each word a command line that is refused."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "1")  # which `main` sets for its process
    return tmp_path


def printed(capsys) -> dict:
    """The one object on standard output; stderr is empty."""
    seen = capsys.readouterr()
    assert seen.err == ""
    return json.loads(seen.out)


@pytest.mark.parametrize("word", [*WRONG, "trian"])
def test_a_refusal_of_every_word_is_one_object(word, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft"])
    assert set(WRONG) == set(WORDS) - {"install-gguf"}
    try:
        code = main([word, *WRONG.get(word, []), "--json"])
    except SystemExit as end:
        code = end.code
    found = printed(capsys)
    assert code == 2 and found.keys() == {"refused"} and all(problem.keys() == KEYS for problem in found["refused"])
    assert found["refused"][0]["fix"] and "--json" not in found["refused"][0]["what"] + found["refused"][0]["fix"]


def test_the_flag_may_stand_before_the_words(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft"])
    with pytest.raises(SystemExit):
        main(["resume", "--json", "outputs/none"])
    assert printed(capsys)["refused"][0]["what"].endswith("/outputs/none")


def test_all_problems_are_in_the_object_and_secrets_are_not(capsys):
    assert main(["preview", "--json", "lora.rr=8", "trainer.learning_rate=fast", "hub_token=hf_" + "a" * 30]) == 2
    found = printed(capsys)["refused"]
    assert {"lora.rr=8", "trainer.learning_rate=fast"} <= {one["what"] for one in found} and len(found) == 3
    assert found[[one["what"] for one in found].index("lora.rr=8")]["fix"] == "lora.r=8" and "a" * 30 not in str(found)


def test_without_the_flag_a_refusal_is_text_on_stderr(capsys):
    assert main(["preview", "lora.rr=8"]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.startswith("Refused: 1 problem")


def preflight(cwd: Path, *words: str) -> tuple[int, dict, str]:
    done = forked.run(ROOT / "train.py", "preflight.mode=only", *SMALL, *words, "--json", cwd=cwd)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_check_is_one_object(empty_folder):
    code, found, _ = preflight(empty_folder)
    assert code == 0 and found.keys() == {"checks", "warnings", "facts"}
    assert {line["state"] for line in found["checks"]} <= {"ok", "warning"} and found["checks"][0].keys() == {
        "part", "state", "text", "fix",
    }  # fmt: skip
    assert found["facts"]["rows"]["train"] > 0 and found["facts"]["plan"]["steps"] > 0
    assert not list(empty_folder.rglob("run.json"))


def test_a_check_that_is_refused_has_its_problems_beside_the_checks(empty_folder):
    rows = "".join(json.dumps({"instruction": f"q {n}", "output": "word " * 300}) + "\n" for n in range(9))
    (empty_folder / "long.jsonl").write_text(rows, encoding="utf-8")
    code, found, _ = preflight(empty_folder, "dataset=local", "dataset.path=long.jsonl", "model.max_seq_length=64")
    assert code == 2 and [problem.keys() for problem in found["refused"]] == [KEYS]
    assert "are longer" in found["refused"][0]["why"] and "refused" in {line["state"] for line in found["checks"]}


def test_a_table_is_one_object(empty_folder, capsys):
    folder = empty_folder / "outputs/sweeps/s"
    index = SweepIndex(folder, "id", "python train.py -m lora.r=4,8", "2026-01-01T00:00:00")
    for rank, loss in (("4", 1.5), ("8", 1.25)):
        job = index.add(Settings(lora=LoraSettings(r=int(rank))), {"lora.r": rank}, ["lora.r"])
        job.status = "finished"
        (folder / job.folder).mkdir(parents=True, exist_ok=True)
        run = {"status": "finished", "config_hash": job.config_hash, "metrics": {"eval_loss": loss, "eval_loss_start": 2.0}}
        (folder / job.folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    index.save()
    assert main(["leaderboard", "--json"]) == 0
    found = printed(capsys)
    assert (found["sweep"], found["metric"], found["greater_is_better"]) == ("outputs/sweeps/s", "eval_loss", False)
    assert [(row["rank"], row["settings"], row["eval_loss"], row["status"]) for row in found["rows"]] == [
        (1, {"lora.r": 8}, 1.25, "finished"), (2, {"lora.r": 4}, 1.5, "finished"),
    ]  # fmt: skip
    assert found["best"] == f"outputs/sweeps/s/{found['rows'][0]['folder']}" and found["remarks"]
    assert main(["leaderboard", "--json", "--best"]) == 0 and printed(capsys) == {"best": found["best"]}
    assert (folder / "leaderboard.csv").is_file()


def test_a_run_is_one_object(empty_folder, capsys):
    folder = empty_folder / "outputs/r"
    folder.mkdir(parents=True)
    run = {"status": "finished", "name": "first", "metrics": {"eval_loss": 1.25}}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    lines = [{"step": step, "loss": 3 - step, "learning_rate": 1e-4} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sample = {"index": 0, "source": "config", "question": "Why?", "finish": "eos"}
    lines = [sample | {"step": step, "completion": f"So {step}."} for step in (0, 1, 2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["show", "run=outputs/r", "--json"]) == 0
    found = printed(capsys)
    assert (found["run"], found["status"], found["name"], found["metric"]) == ("outputs/r", "finished", "first", "eval_loss")
    assert found["metrics"]["eval_loss"] == 1.25 and found["metrics"]["loss"] == 1 and Path(found["curves"]).is_file()
    [shown] = found["samples"]
    assert shown["prompt"] == "Why?" and [one["completion"] for one in shown["completions"]] == ["So 0.", "So 2."]
