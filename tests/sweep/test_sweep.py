"""What a sweep knows without training: its identity, its names, its grid, its table, and what it may say about it."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from sft.cli.target import find_run
from sft.config import fingerprint
from sft.config.method import MethodFacts
from sft.config.schema import Settings
from sft.errors import Refusal
from sft.launch import isolated
from sft.report import page as report_page
from sft.report.texts import speaker
from sft.storage import jsonio
from sft.sweep import leaderboard, publish, runner
from sft.sweep.charts import draw_charts, draw_effect, draw_means
from sft.sweep.grid import check_pairs, compose_job, expand
from sft.sweep.index import SweepIndex, SweepLock, identify, judge, load_index, make_label
from sft.sweep.report import write_sweep_report
from sft.sweep.runner import preset_values
from tests.conftest import ROOT, make_settings


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep([("lora.r=8 seed=1", 1.5, {...}), ...])`: a sweep's folder with one finished run a tuple."""
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    monkeypatch.chdir(tmp_path)

    def make(jobs, name="outputs/sweeps/s"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        index = SweepIndex(folder, "id", "python train.py -m ...", jsonio.now())
        for words, loss, *other in jobs:
            overrides = dict(word.split("=") for word in words.split())
            job = index.add(make_settings(*words.split()), overrides, list(overrides))
            job.status = "finished" if loss is not None else "failed"
            run = {"status": job.status, "config_hash": job.config_hash, "data": {"eval_rows": 8, "held_out_hash": "h"},
                   "metrics": {"eval_loss": loss, "eval_loss_start": 3.0, "tokens": 1000, "tokens_per_second": 10.0},
                   "seconds": {"total": 36.0}, "hardware": {"gpu": None}}  # fmt: skip
            for changes in other:
                for key, value in changes.items():
                    run[key] = {**run.get(key, {}), **value} if isinstance(value, dict) else value
            place = folder / job.folder
            place.mkdir()
            (place / "run.json").write_text(json.dumps(run), encoding="utf-8")
            lines = [{"step": 0, "eval_loss": 3.0}, {"step": 4, "eval_loss": loss}]
            (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            answer = {"step": 4, "prompt": "p", "question": "why?", "reference": "so", "completion": f"{job.number} </script>"}
            (place / "samples.jsonl").write_text(json.dumps(answer) + "\n", encoding="utf-8")
        index.save()
        return folder

    return make


# ---------------------------------------------------------------------------------------------------- identity and names


def test_a_sweep_is_the_same_with_more_values_and_another_with_other_settings():
    base, swept = make_settings("trainer.max_steps=5"), ["lora.r"]
    assert identify(base, swept) == identify(make_settings("trainer.max_steps=5", "lora.r=64"), swept)
    assert identify(base, swept) == identify(
        make_settings("trainer.max_steps=5", "tracking=none", "sweep.isolation=process"), swept
    )
    assert identify(base, swept) == identify(make_settings("trainer.max_steps=5", "samples.num_held_out=4"), swept)
    assert identify(base, swept) != identify(make_settings("trainer.max_steps=6"), swept)
    assert identify(base, swept) != identify(base, ["lora.r", "seed"])
    assert identify(base, ["dataset"]) == identify(make_settings("trainer.max_steps=5", "dataset=alpaca_zh"), ["dataset"])


def test_a_job_is_its_settings_and_keeps_its_number(tmp_path):
    index = SweepIndex(tmp_path)
    first = index.add(make_settings("lora.r=8"), {"lora.r": "8"}, ["lora.r"])
    again = index.add(make_settings("lora=r8", "lora.lora_alpha=16"), {"lora": "r8"}, ["lora"])
    assert again is first, "however it was asked for"
    assert index.add(make_settings("lora.r=4"), {"lora.r": "4"}, ["lora.r"]).folder == "1_r=4"
    index.save()
    assert load_index(tmp_path).jobs == index.jobs


def test_the_seed_of_the_rows_is_part_of_a_job_only_where_it_changes_something():
    assert fingerprint.config_hash(make_settings("seed=7")) == fingerprint.config_hash(
        make_settings("seed=7", "dataset.seed=7")
    )
    assert fingerprint.config_hash(make_settings("seed=7")) != fingerprint.config_hash(
        make_settings("seed=7", "dataset.seed=8")
    )


def test_labels_fit_into_a_folder_name():
    assert make_label({"lora.r": "8", "seed": "1"}, ["lora.r"]) == "r=8"
    assert (
        make_label({"model.name": "a/b", "dataset.name": "c"}, ["model.name", "dataset.name"])
        == "model.name=a-b_dataset.name=c"
    )
    assert len(make_label({"lora.target_modules": "[" + "x," * 99 + "]"}, ["lora.target_modules"])) <= 60
    assert make_label({}, []) == "job"


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    first = SweepLock(tmp_path)
    assert first.take() and not SweepLock(tmp_path).take() and first.owner().isdigit()
    first.release()
    second = SweepLock(tmp_path)
    assert second.take()
    second.release()


@pytest.mark.parametrize(
    ("run", "status"),
    [
        ({"status": "finished", "data": {"eval_rows": 2}, "metrics": {"eval_loss": 1.0}}, "finished"),
        ({"status": "finished", "data": {"eval_rows": 2}, "metrics": {"eval_loss": None}}, "diverged"),
        ({"status": "finished", "data": {"eval_rows": 0}, "metrics": {"loss": 1.0}}, "finished"),
        ({"status": "failed", "metrics": {"bad_steps": 11}, "settings": {"trainer": {"max_bad_steps": 10}}}, "diverged"),
        ({"status": "failed", "reason": "OutOfMemoryError"}, "failed"),
        ({"status": "stopped", "reason": "SIGINT at step 3"}, "stopped"),
        ({"status": "running"}, "stopped"),
    ],
)
def test_how_a_run_ended_is_read_from_its_own_record(run, status):
    assert judge(run)[0] == status


# --------------------------------------------------------------------------------------------------------------- the grid


def grid(*words, paired=()):
    return expand(OverridesParser.create().parse_overrides(list(words)), list(paired))


def test_a_grid_is_every_combination_and_pairs_go_together():
    assert grid("lora.r=1,2", "seed=range(1,3)", "lora=r8") == [
        [f"lora.r={r}", f"seed={s}", "lora=r8"] for r in (1, 2) for s in (1, 2)
    ]
    assert grid("lora.r=8,8,16", "lora.lora_alpha=8,16,16", "seed=1", paired=["lora.r", "lora.lora_alpha"]) == [
        ["lora.r=8", "lora.lora_alpha=8", "seed=1"],
        ["lora.r=8", "lora.lora_alpha=16", "seed=1"],
        ["lora.r=16", "lora.lora_alpha=16", "seed=1"],
    ]
    assert grid("lora.r=1,2", "lora.r=3") == [["lora.r=3"]], "the last one counts, as for presets that are overridden"


JOBS = (
    ("lora.r=8", "trainer.learning_rate=1e-4", "dataset.keep={a:1}", "+trainer.extra.bf16=false"),
    ("lora.r=16", "trainer.learning_rate=2e-4", "dataset.keep={a:1}", "+trainer.extra.bf16=false"),
    ("lora.r=16", "trainer.learning_rate=2e-4", "dataset.keep={b:[2,3]}", "+trainer.extra.bf16=false"),
    ("lora.r=16", "trainer.learning_rate=2e-4", "dataset.keep={b:[2,3]}", "+trainer.extra.fp16=false"),
    ("lora=r64", "dataset.path=null", "lora.target_modules=[q_proj]"),
    ("lora=r64", "dataset.path='a b.json'", "lora.target_modules=[k_proj,v_proj]"),
    ("lora=r8", "dataset.path='a b.json'", "lora.target_modules=[k_proj,v_proj]"),
    ("lora.lora_alpha=32", "lora.r=8"),
    ("lora.lora_alpha=64", "lora.r=4"),
)


def test_a_job_set_on_a_copy_is_the_job_that_hydra_composes():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader, composed, anew = GlobalHydra.instance().config_loader(), {}, 0
        master = loader.load_configuration("config", ["sweep=rank", "model=tiny_random"], RunMode.MULTIRUN)
        for job in JOBS:
            before = len(composed)
            hydras = loader.load_sweep_config(master, list(job))
            ours = compose_job(lambda lines: loader.load_sweep_config(master, lines), list(job), composed)
            anew += len(composed) - before
            with open_dict(hydras):
                for config in (ours, hydras):
                    del config.hydra.run, config.hydra.sweep  # the time of day is in them
            assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(hydras), job
    assert anew == 6, "values alone need no composing"


def test_pairs_that_do_not_fit_are_refused():
    assert "has no list" in check_pairs(["lora.r", "seed"], {"lora.r": 2})[0].why
    assert "lora.r has 2, seed has 3" in check_pairs(["lora.r", "seed"], {"lora.r": 2, "seed": 3})[0].why
    assert check_pairs(["lora.r", "seed"], {"lora.r": 2, "seed": 2}) == []


# -------------------------------------------------------------------------------------------------------------- the table


def test_rows_are_ranked_and_failures_stay_in_the_table(sweep):
    folder = sweep([("lora.r=8", 2.0), ("lora.r=16", None, {"reason": "x"}), ("lora.r=32", 1.5), ("lora.r=64", 3.5)])
    board = leaderboard.read_leaderboard(folder)
    assert [(row.rank, row.values["lora.r"]) for row in board.rows] == [(1, 32), (2, 8), (3, 64), (None, 16)]
    assert board.rows[2].note == "worse than before training"
    leaderboard.write_csv(board)
    table = list(csv.DictReader((folder / "leaderboard.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["lora.r"] for row in table] == ["32", "8", "64", "16"] and table[3]["status"] == "failed"
    assert table[0]["eval_loss"] == "1.5" and table[0]["gpu_hours"] == "" and table[0]["seconds"] == "36.0"
    assert leaderboard.best_run(folder).name == "2_r=32"


def test_the_best_run_of_the_newest_sweep(sweep):
    with pytest.raises(Refusal, match="no sweep"):
        leaderboard.best_run()
    sweep([("lora.r=8", 1.0)], "outputs/sweeps/2026-01-01")
    newest = sweep([("lora.r=8", 2.0)], "outputs/sweeps/2026-01-02")
    assert leaderboard.best_run().resolve() == newest / "0_r=8"
    assert find_run("best")[0].resolve() == find_run(str(newest))[0].resolve() == newest / "0_r=8"
    with pytest.raises(Refusal, match="None of its jobs"):
        leaderboard.best_run(sweep([("lora.r=8", None)], "outputs/sweeps/2026-01-03"))


def test_differences_within_the_spread_of_seeds_are_called_noise(sweep):
    jobs = [("lora.r=8", (1.50, 1.54, 1.46)), ("lora.r=16", (1.52, 1.55, 1.48)), ("lora.r=32", (2.50, 2.54, 2.46))]
    folder = sweep([(f"{r} seed={s} dataset.seed=1", loss) for r, losses in jobs for s, loss in enumerate(losses, 1)])
    board = leaderboard.read_leaderboard(folder)
    assert board.noise == pytest.approx(0.0386, abs=1e-3)
    noisy = {row.values["lora.r"] for row in board.rows if "noise" in row.note}
    assert noisy == {16} and "not known to be worse" in " ".join(board.remarks)


def test_a_lead_beyond_the_spread_is_said_to_be_one(sweep):
    folder = sweep([(f"lora.r={r} seed={s} dataset.seed=1", r / 8 + s / 1000) for r in (8, 16) for s in (1, 2, 3)])
    board = leaderboard.read_leaderboard(folder)
    assert "ahead of all others" in " ".join(board.remarks) and not any("noise" in row.note for row in board.rows)


def test_without_repeated_seeds_the_next_command_repeats_the_best(sweep):
    folder = sweep([("lora.r=8 trainer.max_steps=5", 2.0), ("lora.r=16 trainer.max_steps=5", 1.9)])
    board = leaderboard.read_leaderboard(folder)
    assert "python train.py -m lora.r=16 trainer.max_steps=5 seed=3407,1,2 dataset.seed=3407" in board.next_commands[0]
    assert board.next_commands[0].endswith("hydra.sweep.dir=outputs/sweeps/s")


@pytest.mark.parametrize(
    ("key", "losses", "following"),
    [
        ("trainer.learning_rate", {"1e-4": 2.0, "2e-4": 1.8, "4e-4": 1.5}, "trainer.learning_rate=0.0008,0.0016"),
        ("trainer.learning_rate", {"1e-4": 1.2, "2e-4": 1.8, "4e-4": 1.9}, "trainer.learning_rate=5e-05,2.5e-05"),
        ("lora.r", {"8": 2.0, "16": 1.5}, "lora.r=32,64"),
        ("lora.r", {"8": 2.0, "16": 1.5, "32": 1.6}, None),
    ],
)
def test_a_best_value_on_the_edge_asks_for_the_next_grid(sweep, key, losses, following):
    board = leaderboard.read_leaderboard(sweep([(f"{key}={value}", loss) for value, loss in losses.items()]))
    beyond = [command for command in board.next_commands if "seed=" not in command]
    assert (following in beyond[0]) if following else beyond == []


def test_what_a_preset_sets_is_in_the_command_that_repeats_a_job(sweep):
    jobs = [(f"lora.lora_alpha=${{lora.r}} lora.r={r} lora.lora_dropout=0.1", loss) for r, loss in ((8, 2.0), (16, 1.9))]
    board = leaderboard.read_leaderboard(sweep(jobs))
    assert board.keys == ["lora.r"]
    again, beyond = board.next_commands
    assert "'lora.lora_alpha=${lora.r}' lora.r=16" in again and "'lora.lora_alpha=${lora.r}' lora.r=32,64" in beyond


def test_the_values_of_a_preset_are_read_from_its_file():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        values = {
            name: preset_values(loader, loader.load_configuration("config", [f"sweep={name}"], RunMode.MULTIRUN))
            for name in ("none", "lr", "lr_by_rank", "seeds")
        }
    alpha = {"lora.lora_alpha": "${lora.r}"}
    assert values == {"none": {}, "lr": {}, "lr_by_rank": alpha, "seeds": {"dataset.seed": "3407"}}


def test_unequal_budgets_and_other_held_out_rows_are_said(sweep):
    folder = sweep([("lora.r=8", 2.0), ("lora.r=16", 1.9, {"metrics": {"tokens": 1500}})])
    assert "equally many tokens (1,000 to 1,500)" in " ".join(leaderboard.read_leaderboard(folder).remarks)
    folder = sweep([("seed=1", 2.0), ("seed=2", 1.9, {"data": {"held_out_hash": "other"}})], "t")
    remarks = " ".join(leaderboard.read_leaderboard(folder).remarks)
    assert "2 different sets of held-out rows" in remarks and "dataset.seed=3407" in remarks


def test_the_report_is_whole_and_escapes_what_a_model_says(sweep):
    folder = sweep([(f"lora.r={r} trainer.learning_rate={lr}", r / lr / 1e6) for r in (8, 16) for lr in (1e-4, 2e-4)])
    page = write_sweep_report(leaderboard.read_leaderboard(folder)).read_text(encoding="utf-8")
    charts = page.partition('id="charts">')[2].partition("</script>")[0]
    assert [chart["name"] for chart in json.loads(charts)] == ["curves", "effect", "parallel"]
    assert "0 &lt;/script&gt;" in page and "0 </script>" not in page and "http-equiv" in page
    assert page.count("4 of 4") == 1 and "0_r=8_learning_rate=0.0001" in page and 'src="http' not in page


def test_defaults_of_a_sweep_change_nothing_in_a_run():
    assert Settings().sweep.on_failure.value == "continue" and Settings().sweep.isolation.value == "shared"


# --------------------------------------------------------------------------------------------------------- the commands


def test_the_table_in_the_terminal(sweep, capsys):
    from sft.cli import leaderboard as command

    folder = sweep([("lora.r=8", 2.0), ("lora.r=16", 1.5), ("lora.r=32", None, {"reason": "OutOfMemoryError: full"})])
    assert command.main([]) == 0 and command.main([f"run={folder}"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("1.5000") < shown.index("2.0000") and "lora.r=16 seed=3407,1,2" in shown and "failed" in shown
    assert command.main(["--best"]) == 0 and capsys.readouterr().out.strip() == "outputs/sweeps/s/1_r=16"
    assert command.main(["run=nowhere"]) == 2 and "holds no sweep" in capsys.readouterr().err
    assert command.main(["lora.r=8"]) == 2


def seeds_apart(losses: dict[tuple[int, int], tuple[float, float | None]]) -> list[tuple]:
    """Jobs of (r, seed): (loss before, loss after), each seed with held-out rows of its own."""
    return [(f"lora.r={r} seed={seed}", after, {"data": {"held_out_hash": f"of {seed}", "eval_rows": 4},
             "metrics": {"eval_loss_start": before}}) for (r, seed), (before, after) in losses.items()]  # fmt: skip


def test_where_each_seed_has_rows_of_its_own_runs_are_ranked_by_how_far_they_came(sweep, capsys):
    """Seed 1 has the easier rows: by the loss alone all of its runs would come first."""
    folder = sweep(seeds_apart({(8, 1): (2.0, 1.9), (8, 2): (3.0, 2.8), (16, 1): (2.0, 1.6), (16, 2): (3.0, 2.5)}))
    board = leaderboard.read_leaderboard(folder)
    assert board.by_change and [row.values["lora.r"] for row in board.rows] == [16, 16, 8, 8]
    assert [round(board.value(row), 3) for row in board.rows] == [-0.5, -0.4, -0.2, -0.1]
    text = "\n".join(board.remarks)
    assert "They are ranked by the change from before training." in text and "No setting was run" not in text
    assert board.noise == pytest.approx(0.0707, abs=1e-4), "between the changes of equal settings"
    page = write_sweep_report(board).read_text(encoding="utf-8")
    assert "Ranked by the change of the held-out loss; lower is better." in page and "−0.5000" in page
    assert "each seed has held-out rows of its own" in page and "no setting has several seeds" not in page
    leaderboard.show(folder)
    assert "change" in capsys.readouterr().err


def test_seeds_with_rows_of_their_own_and_no_loss_before_are_not_said_to_be_missing(sweep):
    board = leaderboard.read_leaderboard(sweep(seeds_apart({(r, seed): (None, 2.0) for r in (8, 16) for seed in (1, 2)})))
    text = "\n".join(board.remarks)
    assert not board.by_change and "several seeds, each with held-out rows of its own" in text
    page = write_sweep_report(board).read_text(encoding="utf-8")
    assert "each seed has held-out rows of its own" in page and "no setting has several seeds" not in page


def test_settings_with_seeds_have_their_means_drawn_with_what_the_noise_leaves_open(sweep):
    folder = sweep([(f"lora.r={r} seed={s} dataset.seed=1", r / 8 + s / 10) for r in (8, 16) for s in (1, 2, 3)])
    board = leaderboard.read_leaderboard(folder)
    chart = draw_means(board, speaker("en"))
    half = 2.78 * board.noise / 3**0.5
    first, second = chart["spec"]["data"]["values"]
    assert (first["setting"], first["seeds"], second["setting"]) == ("r 8", 3, "r 16")
    assert (first["mean"], first["low"], first["high"]) == pytest.approx((1.2, 1.2 - half, 1.2 + half), abs=1e-4)
    alone = leaderboard.read_leaderboard(sweep([("lora.r=8", 2.0), ("lora.r=16", 1.5)], "t"))
    assert draw_means(alone, speaker("en")) is None


def test_the_names_of_lines_stand_below_the_plot_and_many_lines_go_from_the_best_to_the_worst(sweep):
    few = draw_charts(leaderboard.read_leaderboard(sweep([(f"lora.r={r}", 3 - r / 8) for r in (4, 8)])), speaker("en"))
    many = draw_charts(leaderboard.read_leaderboard(sweep([(f"lora.r={r}", r / 8) for r in range(1, 15)], "t")), speaker("en"))
    curves = few[0]
    assert [one["label"] for one in curves["legend"]] == ["r=8", "r=4"]
    assert curves["spec"]["encoding"]["color"]["legend"] is None
    assert curves["spec"]["encoding"]["color"]["scale"]["range"] == [one["color"] for one in curves["legend"]]
    assert [one["label"] for one in many[0]["legend"]] == ["the best", "the worst"]
    parallel = many[-1]
    assert parallel["legend"] == many[0]["legend"] and [layer["mark"].get("style") for layer in parallel["spec"]["layer"]] == [
        None, "axis-halo", "axis-value"], "the values have a rim, so that no line strikes them through"  # fmt: skip


def test_the_line_of_an_effect_goes_through_the_means_over_seeds(sweep):
    jobs = [(f"trainer.learning_rate={lr} seed={s} dataset.seed=1", lr * 1e4 + s / 10) for lr in (5e-5, 1e-4) for s in (1, 2)]
    chart = draw_effect(leaderboard.read_leaderboard(sweep(jobs)), speaker("en"))
    line, points = chart["spec"]["layer"]
    assert line["encoding"]["y"]["aggregate"] == "mean" and "tooltip" not in chart["spec"]["encoding"], "it would part the runs"
    assert [one["field"] for one in points["encoding"]["tooltip"]] == ["run", "x", "loss"]
    assert chart["spec"]["encoding"]["x"]["axis"]["format"] == "~e"


def test_a_blank_completion_is_named(sweep):
    folder = sweep([("lora.r=8", 2.0), ("lora.r=16", 1.5)])
    for job in leaderboard.read_leaderboard(folder).index.jobs:
        line = {"prompt": "p", "question": "why?"}
        lines = [{**line, "step": 0, "completion": ""}, {**line, "step": 4, "completion": "\n\n\n"}]
        (folder / job.folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = write_sweep_report(leaderboard.read_leaderboard(folder)).read_text(encoding="utf-8")
    assert page.count("nothing but white space") == 2 and page.count("empty completion") == 1 and page.count(">blank<") == 3


def test_a_sweep_without_the_chart_engine_has_its_table_and_says_that_no_report_is_drawn(sweep):
    folder = sweep([("lora.r=8", 2.0), ("lora.r=16", 1.5)])
    for name in ("leaderboard.csv", "report.html"):
        (folder / name).unlink(missing_ok=True)
    code = "import sys; sys.modules['vl_convert'] = None\n"
    code += "import sft.lifecycle, sft.sweep.runner, sft.launch.isolated; from sft.sweep.publish import refresh\n"
    code += f"from pathlib import Path; refresh(Path({str(folder.resolve())!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "The sweep's report could not be drawn" in done.stderr and "vl_convert" in done.stderr
    assert (folder / "leaderboard.csv").is_file() and not (folder / "report.html").exists()


@pytest.mark.filterwarnings("ignore:.*Pydantic:DeprecationWarning", "ignore:Pydantic V1 style:DeprecationWarning")
def test_the_wandb_workspace_holds_the_sweeps_settings(sweep, capsys):
    pytest.importorskip("wandb_workspaces")
    from scripts import wandb_workspace

    tracking = {"settings": {"tracking": {"entity": "me", "project": "faq"}}}
    sweep([(f"lora.r={r} trainer.learning_rate={lr}", 1.0, tracking) for r in (8, 16) for lr in (1e-4, 2e-4)])
    assert wandb_workspace.main([]) == 2 and "wandb login" in capsys.readouterr().err
    assert wandb_workspace.main(["--dry-run"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["entity"], made["project"], made["displayName"]) == ("me", "faq", "sweep s")
    text = json.dumps(made)
    for part in ("Parallel Coordinates Plot", "lora.value.r", "trainer.value.learning_rate", "summary:eval_loss", "samples"):
        assert part in text, part
    assert '"value": "s"' in text, "the sweep's group alone"
    assert '"value": "sweep"' in text and '"sort": {"keys": [{"key": {"section": "summary", "name": "eval_loss"}' in text
    tracking["tracking"] = {"id": "a", "group": "night", "project": "faq"}
    folder = sweep([(f"lora=r{r}", 1.0, tracking) for r in (8, 32)], "outputs/sweeps/t")
    assert wandb_workspace.main(["--dry-run", f"run={folder}"]) == 0
    text = capsys.readouterr().out
    assert "choices.value.lora" in text and '"value": "night"' in text, "what was chosen of a group; WANDB_RUN_GROUP"


def test_a_leaderboard_that_no_server_takes_is_kept_offline_in_the_jobs_own_group(sweep, monkeypatch):
    import wandb

    folder = sweep([("lora.r=8", 2.0), ("lora.r=16", 1.5)])
    init, modes = wandb.init, []

    def refuse_online(**given):
        modes.append((given["mode"], given["group"]))
        if given["mode"] == "online":
            raise RuntimeError("no such project")
        return init(**given)

    monkeypatch.setattr(wandb, "init", refuse_online)
    monkeypatch.setattr(publish, "choose_mode", lambda mode: ("online", ""))
    publish.track_summary(folder, make_settings("tracking.group=night"))
    assert modes == [("online", "night"), ("offline", "night")]
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/*.json")
    assert [row[0] for row in json.loads(table.read_text(encoding="utf-8"))["data"]] == [1, 2]


def test_a_job_in_a_process_of_its_own_does_not_see_the_modules_of_the_current_folder(tmp_path, monkeypatch, capfd):
    (tmp_path / "sft").mkdir()
    for name in ("sft/__init__.py", "queue.py"):
        (tmp_path / name).write_text("import os; os._exit(77)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    job = (Settings(), tmp_path / "run", types.SimpleNamespace(name="job", overrides=[]), OmegaConf.create({"version": "none"}))
    assert isolated.run_apart(*job).status == "failed"  # the project's own code has started, and refuses this logging
    text = capfd.readouterr().err
    assert "Failed: the job could not begin: ValueError" in text and "Traceback" not in text
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["reason"] == "the process ended with exit code 1"


WAITS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: sys.exit(130))
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_a_lost_terminal_is_passed_on_to_a_job_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(isolated, "python_command", lambda module: [sys.executable, "-c", WAITS])

    def hang_up():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    threading.Thread(target=hang_up, daemon=True).start()
    before = signal.getsignal(signal.SIGHUP)
    job = (Settings(), tmp_path / "run", types.SimpleNamespace(name="job", overrides=[]), OmegaConf.create({}))
    result = isolated.run_apart(*job)
    assert (result.status, result.exit_code) == ("stopped", 130) and signal.getsignal(signal.SIGHUP) == before


def edit_index(folder, change) -> None:
    content = json.loads((folder / "sweep.json").read_text())
    change(content)
    (folder / "sweep.json").write_text(json.dumps(content))


def test_keys_of_another_version_in_a_sweep_are_left_out(sweep):
    folder = sweep([("lora.r=8", 1.5), ("lora.r=4", 1.6)])
    before = load_index(folder)
    edit_index(folder, lambda content: [content.update(colour="red"), *(job.update(colour="red") for job in content["jobs"])])
    assert load_index(folder) == before
    assert find_run("best")[0].name == "0_r=8"


@pytest.mark.parametrize("name", ["../../../precious", "/abs/target", "..", ".", "", "a/b", "a\\b", "link", None, 7, ["x"]])
def test_a_job_that_would_be_trained_outside_of_its_sweep_is_refused(sweep, name):
    folder = sweep([("lora.r=8", 1.5), ("lora.r=4", 1.6)])
    (folder / "link").symlink_to(folder.parent)
    edit_index(folder, lambda content: content["jobs"][1].update(folder=name))
    for read in (load_index, leaderboard.read_leaderboard, lambda place: find_run(str(place))):
        with pytest.raises(Refusal, match=r"sweep\.json[\s\S]*jobs\[1\]"):
            read(folder)


@pytest.mark.parametrize("change", [
    *(lambda c, v=v: c.update(jobs=v) for v in (5, "x", {"a": 1}, [5], [[1]], [{}])),
    *(lambda c, v=v: c["jobs"][0].update(overrides=v) for v in (5, [1], {"lora.r": 8})),
    *(lambda c, v=v: c["jobs"][0].update(number=v) for v in (None, "x", 1.5, True)),
    lambda c: c.update(identity=["x"]), lambda c: c["jobs"][0].update(settings=[1]),
])  # fmt: skip
def test_a_sweep_of_an_odd_form_is_refused_by_name_and_left_out_of_the_others(sweep, caplog, change):
    sweep([("lora.r=8", 1.5)], "outputs/sweeps/a")
    odd = sweep([("lora.r=8", 1.4)], "outputs/sweeps/b")
    edit_index(odd, change)
    with pytest.raises(Refusal, match=r"b/sweep\.json"):
        leaderboard.read_leaderboard(odd)
    assert find_run("best")[0].parent.name == "a" and "b/sweep.json is left out" in caplog.text


def test_jobs_are_ranked_by_their_methods_metric_and_in_its_direction(sweep, monkeypatch):
    folder = sweep([("lora.r=8", 1.0), ("lora.r=16", 3.0), ("lora.r=32", 2.0)])
    board = leaderboard.read_leaderboard(folder)
    assert [row.values["lora.r"] for row in board.rows] == [8, 32, 16] and board.best.metric == 1.0
    up = MethodFacts("up", ("input_ids",), greater_is_better=True)
    monkeypatch.setattr(leaderboard, "facts_of", lambda run: up)
    board = leaderboard.read_leaderboard(folder)
    assert [row.values["lora.r"] for row in board.rows] == [16, 32, 8] and board.best.metric == 3.0
    monkeypatch.setattr(leaderboard, "facts_of", lambda run: MethodFacts("other", (), metric="eval_reward"))
    assert leaderboard.read_leaderboard(folder).best is None
    monkeypatch.setattr(runner, "facts_of", lambda run: up)
    results = [runner._result(job, folder).return_value for job in board.index.jobs]
    assert results == [1.0, 3.0, 2.0]  # and the search maximises: tests/methods/test_grpo_seen.py
