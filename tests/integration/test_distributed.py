"""Runs of several processes are the run of one: the same rows a step, losses, answers and weights; and they end as one."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file

from scripts.fault_campaign import BASE, MEASURED, write_rows
from sft.run import run
from tests.conftest import ROOT, make_settings
from tests.integration.test_bad_numbers import lines_of, quick_report, record_of  # noqa: F401

# 11 rows in steps of 4, so that the last step of each of the two epochs has 3: one process gets a pass without a row.
JOB = (*BASE, "dataset=local", "lora.lora_dropout=0", "trainer.gradient_accumulation_steps=null", "trainer.max_steps=-1",
       "trainer.effective_batch_size=4", "trainer.num_train_epochs=2", "trainer.save_total_limit=9")  # fmt: skip
TWO = "distributed.num_processes=2"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished runs by more than the order of a sum in float32 makes."""
    found, (ours, theirs) = [], (lines_of(one), lines_of(two))
    if [line.keys() for line in ours] != [line.keys() for line in theirs]:
        return ["the lines of metrics.jsonl have other keys"]
    for a, b in zip(ours, theirs, strict=True):
        apart = {key: (a[key], b[key]) for key in a.keys() - MEASURED if abs(a[key] - b[key]) > 1e-5}
        found += [f"step {a['step']}: {apart}"] if apart else []
    if (one / "samples.jsonl").read_bytes() != (two / "samples.jsonl").read_bytes():
        found.append("samples.jsonl")
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    far = max(float(numpy.abs(ours[name] - theirs[name]).max()) for name in ours)
    return found + ([f"the adapters are {far} apart"] if far > 1e-5 else [])


def command_of(*words: str, torchrun: bool = False) -> list[str]:
    return [sys.executable, *(TORCHRUN if torchrun else ()), str(ROOT / "train.py"), *words]


def train(cwd: Path, *overrides: str, torchrun: bool = False) -> subprocess.CompletedProcess:
    command = command_of(*overrides, torchrun=torchrun)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=200)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """The run of one process that the others are held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.report.vl_convert.javascript_bundle", lambda *args: "")
        assert run(make_settings(*JOB, f"dataset.path={work / 'rows.jsonl'}"), work / "whole").status == "finished"
    return work / "whole"


@pytest.mark.parametrize("torchrun", [False, True])
def test_two_processes_are_the_run_of_one(work, whole, torchrun):
    name = "torchrun" if torchrun else "two"
    job = (*JOB, f"dataset.path={work / 'rows.jsonl'}", f"hydra.run.dir={name}", *(() if torchrun else (TWO,)))
    done = train(work, *job, torchrun=torchrun)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("Model  embedded") == 1
    two, record = work / name, record_of(work / name)
    assert differences(whole, two) == []
    assert record["processes"] == 2 and record["config_hash"] == record_of(whole)["config_hash"]
    final = [{k: v for k, v in record_of(f)["metrics"].items() if k not in MEASURED} for f in (whole, two)]
    assert final[0] == pytest.approx(final[1], abs=1e-5)
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        p.name for p in two.iterdir() if p.name[0] != "." and p.name != "train.log"
    )
    assert not (work / "outputs").exists()


def test_a_loss_that_each_process_divides_by_its_own_tokens_is_found_different(work, whole):
    fault = "trainer.extra.average_tokens_across_devices=false"  # refused on the command line
    run(make_settings(*JOB, f"dataset.path={work / 'rows.jsonl'}", TWO, fault), work / "fault")
    assert any("step 1" in line for line in differences(whole, work / "fault"))
