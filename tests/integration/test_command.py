"""train.py as people run it: exit codes, what is printed, Ctrl-C, sweeps, and what W&B can read afterwards.

Where a terminal or W&B is the matter, it is started as from a shell; else it is forked from a process that has
imported the libraries.
"""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import forked
from tests.conftest import ROOT, SMALL

QUICK = ("trainer=debug", *SMALL)
ENDLESS = ("trainer.max_steps=100000", "trainer.eval_steps=50000", "trainer.save_steps=50000")


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def train(cwd: Path, *overrides: str) -> subprocess.CompletedProcess:
    return forked.run("train.py", *overrides, cwd=cwd)


def test_a_run_with_wandb_can_be_read_back_offline(tmp_path):
    """No key, no network: offline by itself, one line on how to sync, curves and sample table in the W&B file."""
    words = command(*QUICK, "tracking=wandb", "hydra.run.dir=run")
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wandb sync" in done.stderr and "wandb leet" in done.stderr and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and record["tracking"]["mode"] == "offline"
    (binary,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    shown = subprocess.run([wandb, "leet", "inspect", "--json", str(binary)], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    for key in ("eval/loss", "train/learning_rate", "perf/tokens_per_second", "samples/eos_share", "samples"):
        assert f'"{key}"' in shown.stdout or f'[\\"{key}\\"]' in shown.stdout or key in shown.stdout, key
    tables = list((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/*.json"))
    rows = [row for table in tables for row in json.loads(table.read_text(encoding="utf-8"))["data"]]
    steps = sorted({row[0] for row in rows})
    assert steps[0] == 0 and len(steps) >= 2
    base = {row[1]: row[3] for row in rows if row[0] == 0}
    assert all(row[2] == base[row[1]] for row in rows)


def test_the_log_of_a_run_stands_in_its_folder(tmp_path):
    done = train(tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.endswith("_tiny_random_twists")
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "held-out loss" in log and "rows to train on" in log
    assert {".hydra", "run.json", "metrics.jsonl", "adapter"} <= {p.name for p in folder.iterdir()}
    assert not (tmp_path / "unsloth_compiled_cache").exists() and not (tmp_path / "wandb").exists()


def test_ctrl_c_saves_and_marks_the_run_as_stopped(tmp_path):
    overrides = (
        *SMALL,
        "trainer.max_steps=100000",
        "trainer.eval_steps=50000",
        "trainer.save_steps=50000",
        "hydra.run.dir=run",
    )
    (tmp_path / "errors").touch()
    process = forked.Process("train.py", *overrides, cwd=tmp_path, files=(os.devnull, os.devnull, tmp_path / "errors"))
    try:
        metrics, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < limit and not (metrics.is_file() and metrics.read_text().count('"loss"') > 3):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.wait(120)
    finally:
        process.kill()
    errors = (tmp_path / "errors").read_text(encoding="utf-8")
    assert process.returncode == 130, errors[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "stopped" and record["reason"].startswith("SIGINT at step")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file() and "Traceback" not in errors


def wait_for_lines(process: subprocess.Popen | forked.Process, metrics: Path, count: int, terminal: int | None = None) -> None:
    """Wait until a run has logged so many steps, and read what it writes to its terminal."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (metrics.is_file() and metrics.read_text().count('"loss"') >= count):
        assert process.poll() is None
        while terminal is not None and select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 65536)
        time.sleep(0.1)


def hang_up(process: subprocess.Popen | forked.Process, terminal: int, run: Path) -> None:
    """Close the terminal of a run, as its window is closed, and see that it ends saved."""
    try:
        wait_for_lines(process, run / "metrics.jsonl", 3, terminal)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 130
    finally:
        process.kill()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "stopped" and record["reason"].startswith("SIGHUP at step")
    step = record["reason"].rsplit(" ", 1)[1]
    assert (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").is_file()


SESSION = """import fcntl, multiprocessing.util, os, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
multiprocessing.util._flush_std_streams = lambda: None  # it would fail: the terminal is gone
"""
"""Before a forked run: the terminal is its own."""


def test_a_run_whose_terminal_is_gone_stops_and_saves(tmp_path):
    """The terminal takes no line any more, and a shell sends the signal once more. Of two processes: test_distributed.py."""
    words = (*SMALL, *ENDLESS, "hydra.run.dir=run")
    outside, terminal = pty.openpty()
    (tmp_path / "session.py").write_text(SESSION, encoding="utf-8")
    files = [os.ttyname(terminal)] * 3
    process = forked.Process("train.py", *words, cwd=tmp_path, before=tmp_path / "session.py", files=files)
    wait_for_lines(process, tmp_path / "run" / "metrics.jsonl", 1, outside)  # it has opened the terminal
    os.close(terminal)
    hang_up(process, outside, tmp_path / "run")


def test_under_nohup_a_run_goes_on(tmp_path):
    (tmp_path / "nohup.py").write_text("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    short = ("trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1", "samples.num_held_out=0")
    words = (*SMALL, *short, "trainer.max_steps=60", "trainer.save_steps=60", "hydra.run.dir=run")
    process = forked.Process("train.py", *words, cwd=tmp_path, before=tmp_path / "nohup.py")
    try:
        wait_for_lines(process, tmp_path / "run" / "metrics.jsonl", 2)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_data_error_leaves_no_folder_behind(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a?", "answer": "b"}\n{"question": "c?"\n', encoding="utf-8")
    done = train(tmp_path, *QUICK, "dataset.path=data.jsonl")
    assert done.returncode == 2 and "data.jsonl, line 2" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("outputs/*"))
    (tmp_path / "data.jsonl").write_text('{"question": "a?", "answer": "b"}\n', encoding="utf-8")
    done = train(tmp_path, *QUICK, "dataset.path=data.jsonl")
    assert done.returncode == 2 and "dataset.columns.output=answer" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("outputs/*"))


def test_a_failing_job_does_not_end_a_sweep_and_shows_in_the_exit_code(tmp_path):
    """lora.target_modules of the second job names a layer that is not there; the third job still runs."""
    done = train(tmp_path, "-m", *QUICK, "lora.target_modules=[q_proj],[nothing_proj],[v_proj]", "hydra.sweep.dir=sweep")
    assert done.returncode == 2 and "nothing_proj" in done.stderr, done.stderr[-3000:]
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((tmp_path / "sweep").glob("*/run.json"))]
    assert [r["status"] for r in records] == ["finished", "failed", "finished"]
    assert "nothing_proj" in records[1]["reason"]


def test_a_failure_outside_of_training_is_recorded_too(tmp_path):
    """The trainer cannot be built, for a reason nobody foresaw: one line, exit 1, and the reason in run.json."""
    (tmp_path / "plant.py").write_text(
        "import sft.methods.sft\n"
        "def fail(*arguments, **keywords):\n"
        "    raise OSError('a fault that nobody foresaw')\n"
        "sft.methods.sft.build_trainer = fail\n"
    )
    done = forked.run("train.py", *QUICK, "hydra.run.dir=run", cwd=tmp_path, before=tmp_path / "plant.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "Failed:" in done.stderr and "a fault that nobody foresaw" in done.stderr, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
