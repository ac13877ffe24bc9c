"""The benchmark of the model families, with tiny models on the CPU."""

import datetime
import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import families, grid, speed
from tests import forked
from tests.conftest import ROOT

SMALL = ("--words", "8", "--steps", "3", "--warm-up", "1")


@pytest.fixture
def forked_programs(monkeypatch):
    """What the benchmark starts is forked from a process that has imported the libraries."""

    def start(command, stdout=None, **_):
        output = stdout.name if stdout else "/dev/null"
        return forked.Process(*command[1:], cwd=ROOT, files=("/dev/null", output, output))

    def run(command, stdout=None, check=False, **_):
        process = start(command, stdout)
        assert process.wait(280) == 0 or not check
        return subprocess.CompletedProcess(command, process.returncode)

    for module in (families, speed):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=start, run=run, STDOUT=None))


def test_each_shape_is_trained_its_memory_estimated_and_a_peer_beside_it(forked_programs, tmp_path, capsys):
    shapes = ["tiny_hybrid", "tiny_moe", "tiny_gpt_oss"]
    families.main(["--shape", ",".join(shapes), "--out", str(tmp_path), *SMALL])
    results = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))["results"]
    assert [*results] == shapes and all("error" not in run for runs in results.values() for run in runs.values()), results
    for runs in results.values():
        ours, trl = runs["ours"], runs["trl"]
        assert ours["tokens"] == trl["tokens"] and len(ours["tokens"]) == 2
        assert ours["losses"][0] == pytest.approx(trl["losses"][0], rel=1e-2)
        assert ours["estimated_gib"] > 0 and ours["tokens_at_once"] >= max(ours["tokens"])
    why = {shape: runs["ours"]["speed"]["why_not"] for shape, runs in results.items()}
    assert "convolutions" in why["tiny_hybrid"] and why["tiny_moe"] == "" and "sinks" in why["tiny_gpt_oss"]
    assert "in_proj_qkv" in results["tiny_hybrid"]["ours"]["targets"]
    lines = (tmp_path / "families.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| {shape}" for shape in shapes]
    assert lines[-1] in capsys.readouterr().out and not list(tmp_path.glob("model_*/"))


def test_a_part_that_fails_says_so_and_the_others_go_on(forked_programs, tmp_path, capsys):
    families.main(["--shape", "tiny_moe", "--out", str(tmp_path), *SMALL, "--overrides", "trainer.learning_rate=none"])
    runs = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))["results"]["tiny_moe"]
    assert "trainer.learning_rate" in runs["ours"]["error"] and "error" not in runs["trl"]
    assert "tiny_moe ours" in (tmp_path / "families.md").read_text(encoding="utf-8")
    assert "failed: " in capsys.readouterr().out


def test_a_grid_has_each_point_of_ours_and_of_a_peer(forked_programs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(grid, "subprocess", families.subprocess)
    monkeypatch.setattr(grid, "AXES", {"rows": [1], "length": [96, 128], "rank": [4, 8]})
    options = ["--model", "tiny_random", "--out", str(tmp_path), "--modes", "default", "--steps", "3", "--warm-up", "1"]
    grid.main([*options, "--axes", "rank", "--peers", "trl"])
    ways = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))["results"]["rank"]
    assert all(len(ways[way][point]) == 1 for way in ("default", "trl") for point in ("4", "8"))
    assert not any("error" in run for points in ways.values() for runs in points.values() for run in runs), ways
    lines = (tmp_path / "grid.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines if line[:3] in ("| 4", "| 8")] == [
        "| 4",
        "| 8",
    ] and "default x trl" in lines[2]
    assert (tmp_path / "grid.svg").read_text(encoding="utf-8").startswith("<svg")
    grid.main([*options, "--axes", "rank", "--points", "4"])  # once more: measured again, beside what is there
    runs = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))["results"]["rank"]["default"]
    assert [len(runs[point]) for point in ("4", "8")] == [2, 1] and runs["4"][0] != runs["4"][1]
    (tmp_path / "grid.json").write_text(text := (tmp_path / "grid.json").read_text().replace('"date": "20', '"date": "19'))
    with pytest.raises(SystemExit):
        grid.main([*options, "--axes", "rank", "--points", "4"])
    assert (tmp_path / "grid.json").read_text() == text and "another day" in capsys.readouterr().err
    (tmp_path / "grid.json").unlink()
    grid.main([*options, "--axes", "rows", "--rounds", "2"])
    for length in (96, 128, 160):  # none goes on with the sweep of another call
        grid.main([*options, "--axes", "length", "--points", str(length)])
    results = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))["results"]
    tokens = [runs[0]["tokens"][0] for runs in results["length"]["default"].values()]
    assert tokens[1] > 1.5 * tokens[0] and tokens[2] > 1.3 * tokens[1] and len(results["rows"]["default"]["1"]) == 2
    assert "failed" not in capsys.readouterr().out


def test_a_grid_shows_how_far_rounds_are_apart_and_compares_with_the_best_of_a_peer():
    def rounds(*rates: float) -> list[dict]:
        return [{"tokens": [1, rate], "seconds": [1, 1], "peak_reserved_gib": 2.0} for rate in rates]

    ways = {"bf16": {"8": rounds(1000, 1050, 1020)}, "trl": {"8": rounds(300, 500, 340), "16": [{"error": "lost"}]}}
    lines = grid.tables({"results": {"rows": ways}, "steps": {"rows": [2, 1]}}).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["8", "1,020", "2.0", "340 (300 to 500)", "2.0", "2.04"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["16", "", "", "failed", "", ""]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--axes", "rank,row"], "row: there are rows, length, rank"),
        (["--modes", "fp9"], "fp9: there are bf16, nf4, fp8, default"),
        (["--peers", "axolotl"], "axolotl: there are unsloth, trl"),
        (["--axes", "rank", "--steps", "4"], "grid.json has other steps of rank: --out=<another folder>"),
    ],
)
def test_a_grid_that_cannot_be_measured_is_refused(tmp_path, capsys, words, why):
    facts = {"date": f"{datetime.date.today()}", "hardware": speed.hardware(), "versions": speed.versions()}
    (tmp_path / "grid.json").write_text(text := json.dumps({**facts, "steps": {"rank": [45, 25]}}))
    with pytest.raises(SystemExit):
        grid.main(["--model", "tiny_random", "--out", str(tmp_path), *words])
    assert why in capsys.readouterr().err and (tmp_path / "grid.json").read_text() == text


def test_a_grid_says_what_failed_and_leaves_blank_what_was_not_measured():
    runs = {"8": [{"error": "torch.OutOfMemoryError: CUDA out of memory."}], "4": [{"error": "ValueError: rank"}]}
    assert [grid.missing(runs, point) for point in (2, 4, 8)] == ["", "failed", "no memory"]


def test_points_of_a_grid_that_fail_say_why_and_the_others_stand(forked_programs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(grid, "subprocess", families.subprocess)
    options = ["--model", "tiny_random", "--out", str(tmp_path), "--modes", "default", "--steps", "3", "--warm-up", "1"]
    grid.main([*options, "--axes", "rank", "--points", "0,4"])
    assert "| 4 |" in (tmp_path / "grid.md").read_text(encoding="utf-8") and "failed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        grid.main([*options, "--points", "4"])
