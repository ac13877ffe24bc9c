"""Runs of several processes are the run of one: the same rows a step, losses, answers and weights; and they end as one."""

import contextlib
import fcntl
import ipaddress
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from safetensors.numpy import load_file

from sft.errors import Refusal
from sft.launch.ranks import launch
from sft.lifecycle import run
from sft.runs.record import Context
from tests import forked
from tests.conftest import ROOT, make_settings
from tests.faults.fault_campaign import BASE, MEASURED, write_rows
from tests.integration.test_command import ENDLESS, hang_up, wait_for_lines
from tests.integration.test_nonfinite import lines_of, quick_report, record_of  # noqa: F401

# 11 rows in steps of 4, so that the last step of each of the two epochs has 3: one process gets a pass without a row.
JOB = (*BASE, "dataset=local", "lora.lora_dropout=0", "trainer.gradient_accumulation_steps=null", "trainer.max_steps=-1",
       "trainer.effective_batch_size=4", "trainer.num_train_epochs=2", "trainer.save_total_limit=9")  # fmt: skip
TWO = "distributed.num_processes=2"
TORCHRUN = ("--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"))


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished runs by more than the order of a sum in float32 makes."""
    found, (ours, theirs) = [], (lines_of(one), lines_of(two))
    if [line.keys() for line in ours] != [line.keys() for line in theirs]:
        return ["the lines of metrics.jsonl have other keys"]
    for a, b in zip(ours, theirs, strict=True):
        near = {key: 1e-4 * a[key] if key == "grad_norm" else 1e-5 for key in a.keys() - MEASURED}
        apart = {key: (a[key], b[key]) for key in near if abs(a[key] - b[key]) > near[key]}
        found += [f"step {a['step']}: {apart}"] if apart else []
    if (one / "samples.jsonl").read_bytes() != (two / "samples.jsonl").read_bytes():
        found.append("samples.jsonl")
    rows = [map(json.loads, (folder / "eval_rows.jsonl").read_text().splitlines()) for folder in (one, two)]
    ours, theirs = ({line["step"]: line for line in lines} for lines in rows)
    if not {0} < ours.keys() & theirs.keys():  # where weights are shared out rows are padded, and known before and after alone
        found.append("eval_rows.jsonl")
    for step in ours.keys() & theirs.keys():
        a, b = ours[step], theirs[step]
        same = a["targets"] == b["targets"] and a["losses"] == pytest.approx(b["losses"], abs=1e-4)
        found += [] if same else [f"eval_rows.jsonl, step {step}"]
    ours, theirs = (load_file(next(folder.glob("[am]*/*model.safetensors"))) for folder in (one, two))
    far = max(float(numpy.abs(ours[name] - theirs[name]).max()) for name in ours)
    return found + ([f"the weights are {far} apart"] if far > 1e-5 else [])


def program_of(torchrun: bool) -> tuple[str | Path, ...]:
    """What is forked, with its first words."""
    return (Path(torch.__file__).parent / "distributed" / "run.py", *TORCHRUN) if torchrun else ("train.py",)


def train(cwd: Path, *overrides: str, torchrun: bool = False, **more: str) -> subprocess.CompletedProcess:
    """The command, forked, with its ranks."""
    return forked.run(*program_of(torchrun), *overrides, cwd=cwd, env={**os.environ, **more}, timeout=200)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """The run of one process that the others are held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.report.page.bundled_charts", lambda: "")
        assert run(make_settings(*JOB, f"dataset.path={work / 'rows.jsonl'}"), work / "whole").status == "finished"
    return work / "whole"


@pytest.mark.parametrize("torchrun", [False, True])
def test_two_processes_are_the_run_of_one(work, whole, torchrun):
    name = "torchrun" if torchrun else "two"
    job = (*JOB, f"dataset.path={work / 'rows.jsonl'}", f"hydra.run.dir={name}", *(() if torchrun else (TWO,)))
    (work / f"{name} temporary").mkdir()
    done = train(work, *job, torchrun=torchrun, TMPDIR=str(work / f"{name} temporary"))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    left = {path.name.partition("_")[0] for path in (work / f"{name} temporary").iterdir()}
    assert torchrun or left <= {"torchinductor"}  # torchrun's own folder is its business
    assert done.stderr.count("Model  built-in") == 1
    two, record = work / name, record_of(work / name)
    assert differences(whole, two) == []
    assert record["processes"] == 2 and record["config_hash"] == record_of(whole)["config_hash"]
    final = [{k: v for k, v in record_of(f)["metrics"].items() if k not in MEASURED} for f in (whole, two)]
    assert final[0] == pytest.approx(final[1], abs=1e-5)
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        p.name for p in two.iterdir() if p.name[0] != "." and p.name != "train.log"
    )
    assert not (work / "outputs").exists()


def test_a_loss_that_each_process_divides_by_its_own_tokens_is_found_different(work, whole, forked_children):
    fault = "trainer.extra.average_tokens_across_devices=false"  # refused on the command line
    launch(make_settings(*JOB, f"dataset.path={work / 'rows.jsonl'}", TWO, fault), work / "fault", Context())
    assert any("step 1" in line for line in differences(whole, work / "fault"))


def cut_back(finished: Path, folder: Path) -> None:
    """Make `folder` of a finished run, as if it had been killed in its second epoch, after step 4."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    record = {**record_of(folder), "status": "running"}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def test_a_run_goes_on_in_another_number_of_processes(work, whole, forked_children):
    """From one to two processes with the command typed again, and from two to one with `resume=`."""
    cut_back(whole, work / "from one")
    assert (
        launch(make_settings(*JOB, f"dataset.path={work / 'rows.jsonl'}", TWO), work / "from one", Context()).status
        == "finished"
    )
    assert differences(whole, work / "from one") == [] and record_of(work / "from one")["processes"] == 2

    checkpoint = work / "from one" / "checkpoints" / "checkpoint-6"  # which two processes have written
    assert {p.name for p in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    shutil.rmtree(work / "from one" / "checkpoints" / "checkpoint-4")
    cut_back(work / "from one", work / "from two")
    shutil.copytree(checkpoint, work / "from two" / "checkpoints" / "checkpoint-6")
    done = train(work, "resume=from two", "distributed.num_processes=1")
    assert done.returncode == 0 and "Resume from step 6" in done.stderr, done.stderr[-3000:]
    assert differences(whole, work / "from two") == [] and record_of(work / "from two")["processes"] == 1


def start_and_wait(
    cwd: Path, folder: str, *overrides: str, torchrun: bool = False
) -> tuple[forked.Process, dict[str, psutil.Process]]:
    """A long run that has made its second step, and its ranks' processes by their number."""
    job = (*JOB, "dataset.path=rows.jsonl", "trainer.num_train_epochs=99", "trainer.eval_steps=90", "trainer.save_steps=90")
    words = (*job, f"hydra.run.dir={folder}", *overrides)
    note, errors = cwd / f"{folder}.py", cwd / f"{folder}.err"
    errors.touch()
    note.write_text(
        "import os, pathlib\n"
        f'pathlib.Path({str(cwd)!r}, f\'{folder}.rank{{os.environ.get("RANK", "s")}}\').write_text(str(os.getpid()))\n'
    )
    process = forked.Process(*program_of(torchrun), *words, cwd=cwd, before=note, files=(os.devnull, os.devnull, errors))
    lines, limit = cwd / folder / "metrics.jsonl", time.monotonic() + 100
    while time.monotonic() < limit and not (lines.exists() and '"step": 2' in lines.read_text(encoding="utf-8")):
        assert process.poll() is None, errors.read_text(encoding="utf-8")[-3000:]
        time.sleep(0.05)
    return process, {rank: psutil.Process(int((cwd / f"{folder}.rank{rank}").read_text())) for rank in "01"}


@pytest.mark.parametrize(("torchrun", "rank"), [(False, "1"), (True, "0")])
def test_a_rank_that_is_killed_ends_the_run_with_its_reason(work, torchrun, rank):
    name = f"killed-{rank}"
    process, ranks = start_and_wait(work, name, *(() if torchrun else (TWO,)), torchrun=torchrun)
    ranks[rank].kill()
    assert process.wait(60) == 1
    record = record_of(work / name)
    assert record["status"] == "failed" and record["ended_at"]
    assert record["reason"].startswith(f"rank {rank}") and ("SIGKILL" in record["reason"] or torchrun)
    assert not [child for child in ranks.values() if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def listeners_of(process: psutil.Process) -> list[str]:
    """The addresses on which a process listens for TCP, from /proc."""
    held = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            held.add(os.readlink(descriptor))
    found = []
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{kind}").read_text(encoding="utf-8").splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:  # 0A: it listens
                words = [bytes.fromhex(local[i : i + 8])[::-1] for i in range(0, len(local) - 5, 8)]
                found.append(f"{ipaddress.ip_address(b''.join(words))} {int(local[-4:], 16)}")
    return found


def answer_to_store_client(address: str, port: int) -> bytes:
    """What comes back for the first words of a client of torch's TCPStore: its magic number, and a ping, which is sent back."""
    with socket.create_connection((address, port), 1) as line, contextlib.suppress(OSError):
        line.sendall(b"\x00" + (0x3C85F7CE).to_bytes(4, "little") + b"\x0d" + b"ping")
        return line.recv(8)
    return b""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_processes_listen_on_loopback_alone_and_to_no_client_of_a_store_and_stop_where_their_terminal_is_gone(work):
    """In a folder whose modules raise: the current folder is not on the path of the ranks."""
    theirs = work / "theirs"
    (theirs / "sft").mkdir(parents=True)
    for name in ("sft/__init__.py", "queue.py", "pickle.py"):
        (theirs / name).write_text("raise SystemExit('somebody else's code')", encoding="utf-8")
    write_rows(theirs)
    outside, terminal = pty.openpty()
    words = (*JOB, "dataset.path=rows.jsonl", *ENDLESS, "hydra.run.dir=run", TWO)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words], cwd=theirs,
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    try:
        wait_for_lines(process, theirs / "run" / "metrics.jsonl", 2, outside)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        found = [listener.split() for one in everyone for listener in listeners_of(one)]
        assert len(ranks) == 2 and {address for address, _ in found} <= {"127.0.0.1", "::1"}
        for address, port in found:
            assert answer_to_store_client(address, int(port)) == b""
        hang_up(process, outside, theirs / "run")
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_all_processes_after_the_step_and_saves(work, name):
    process, _ = start_and_wait(work, name, TWO)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 130
    record, errors = record_of(work / name), (work / f"{name}.err").read_text(encoding="utf-8")
    assert record["status"] == "stopped" and record["reason"].startswith(f"{name} at step")
    assert errors.count(f"{name}: stopping after this step") == 1 and "Traceback" not in errors
    step = record["reason"].rsplit(" ", 1)[1]
    assert (work / name / "checkpoints" / f"checkpoint-{step}" / "manifest.json").is_file()


def test_one_process_refuses_for_all(work):
    """A mistake on the command line under torchrun, started as from a shell, and one that only the rows show."""
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, "lora.rr=8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, timeout=200)
    assert done.returncode == 1 and done.stderr.count("Refused") == 1 and "exitcode  : 2" in done.stderr
    done = train(work, *JOB, TWO, "dataset.path=rows.jsonl", "model.max_seq_length=8", "hydra.run.dir=refused")
    assert done.returncode == 2 and done.stderr.count("Refused") == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert not (work / "refused").exists()


def test_processes_with_a_share_of_the_weights_each_are_the_run_of_one(work, monkeypatch, forked_children):
    """Full fine-tuning through FSDP2, cut back to its second epoch and gone on with; one process cannot read its checkpoint."""
    monkeypatch.setattr("sft.report.page.bundled_charts", lambda: "")
    full = (*JOB, "lora=none", "trainer.learning_rate=1e-3", f"dataset.path={work / 'rows.jsonl'}")
    shared = (*full, TWO, "distributed.strategy=fsdp")
    assert run(make_settings(*full), work / "full").status == "finished"
    assert launch(make_settings(*shared), work / "fsdp", Context()).status == "finished"
    assert differences(work / "full", work / "fsdp") == []

    cut_back(work / "fsdp", work / "fsdp cut")
    with pytest.raises(Refusal, match=r"written with distributed\.strategy=fsdp"):
        run(make_settings(*full), work / "fsdp cut")
    assert launch(make_settings(*shared), work / "fsdp cut", Context()).status == "finished"
    assert differences(work / "full", work / "fsdp cut") == []
