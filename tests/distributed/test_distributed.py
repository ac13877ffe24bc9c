"""Shares of a step's rows, and what is refused of several processes."""

import io
import os
import subprocess
import sys
import time
import types

import pytest
import torch

from sft import processes as sft_processes
from sft.config.batching import check_batch_plan
from sft.config.rules import check_settings
from sft.config.schema import TrainerSettings
from sft.data import collators
from sft.distributed import group as distributed_group
from sft.distributed import strategy
from sft.launch import ranks
from sft.training import metrics, samplers
from tests.conftest import ROOT, make_settings
from tests.hints import type_hints


@pytest.fixture
def group(monkeypatch):
    """This process as the first of four."""
    found = distributed_group.Group(0, 4, None)
    monkeypatch.setattr(distributed_group, "_group", found)
    return found


@pytest.mark.parametrize(("rows", "fillers"), [(7, 1), (8, 0), (9, 7)])
def test_fillers_make_equal_shares(rows, fillers):
    shared = samplers.PaddedDistributedSampler(reversed(range(rows)), rows, 8)
    assert list(shared) == [*reversed(range(rows)), *[rows] * fillers] and len(shared) == rows + fillers


def test_without_other_processes_everything_is_left_as_it_is():
    inputs = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    assert int(metrics.count_tokens(inputs)) == 4
    assert samplers.share_rows("sampler", 3, 2) == "sampler" and distributed_group.gathered(5) == [5]
    assert samplers.with_filler("rows", 0) == "rows" and samplers.epochs_done(0.7, 9, 2) == 0.7


def test_a_process_takes_one_of_several_gpus(tmp_path):
    """Else transformers has as many times the rows in a pass, and a step is another one."""
    from sft.methods.arguments import training_arguments
    from sft.plan.plan import Plan

    settings = make_settings("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4")
    args = training_arguments(settings, tmp_path, False, Plan())
    args._n_gpu = 2  # as where two are seen
    assert args.train_batch_size == 4
    strategy.settle_device(args)
    assert args.train_batch_size == 2


def test_shared_weights_are_computed_with_in_16_bits_and_losses_are_not_rounded_to_them():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)  # what accelerate sets
    plugin = types.SimpleNamespace(mixed_precision_policy=half)
    strategy.settle_accelerator(types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin)), torch.nn.Linear(2, 2))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    alone = types.SimpleNamespace(state=types.SimpleNamespace(), ddp_handler=types.SimpleNamespace())
    strategy.settle_accelerator(alone, torch.nn.Linear(2, 2))
    assert alone.ddp_handler.gradient_as_bucket_view


def test_what_another_process_has_not_signed_is_not_unpickled(monkeypatch):
    monkeypatch.setattr(distributed_group, "_secret", b"the job's")
    file = io.BytesIO()
    distributed_group.SignedPickler(file).dump({"value": 1})
    signed = file.getvalue()
    assert distributed_group.SignedUnpickler(io.BytesIO(signed)).load() == {"value": 1}
    monkeypatch.setattr(distributed_group.pickle, "loads", pytest.fail)
    for other in (b"", signed[:-1], bytes(32) + signed[32:]):
        with pytest.raises(RuntimeError, match="not signed"):
            distributed_group.SignedUnpickler(io.BytesIO(other)).load()


def test_all_objects_that_torch_sends_around_pass_through_the_signature(monkeypatch):
    """The names are torch's private ones, which another version may change."""
    from torch.distributed import distributed_c10d as c10d

    monkeypatch.setattr(c10d, "_pickler", distributed_group.SignedPickler)
    monkeypatch.setattr(c10d, "_unpickler", distributed_group.SignedUnpickler)
    monkeypatch.setattr(distributed_group, "_secret", b"the job's")
    tensor, size = c10d._object_to_tensor("value", "cpu", None)
    assert c10d._tensor_to_object(tensor, size, None) == "value"
    monkeypatch.setattr(distributed_group, "_secret", b"another's")
    with pytest.raises(RuntimeError, match="not signed"):
        c10d._tensor_to_object(tensor, size, None)


def test_a_rank_starts_away_from_the_current_folder_and_talks_over_loopback(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "here", "/there"]))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    environment = ranks._environment(tmp_path, 1, 2)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/there"]
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["GLOO_SOCKET_IFNAME"][:2]) == ("1", "2", "lo")
    assert "MASTER_ADDR" not in environment
    assert sft_processes.python_command("sft.distributed.watchdog")[1:] == ["-P", "-m", "sft.distributed.watchdog"]


@pytest.mark.parametrize(
    ("ends", "first"),
    [(["0", "0"], None), (["0", "exit(3)"], (1, 3)), (["exit(1)", "os.kill(os.getpid(), 9)"], (1, -9)),
     (["time.sleep(99)", "exit(1)"], (1, 1))],
)  # fmt: skip
def test_the_rank_that_was_killed_or_failed_first_is_the_cause(ends, first):
    children = [subprocess.Popen([sys.executable, "-c", f"import os, time; {end}"]) for end in ends]
    while any(child.poll() is None for child, end in zip(children, ends, strict=True) if "sleep" not in end):
        time.sleep(0.01)
    assert ranks._first_failure(children) == first
    ranks._end(children)
    assert None not in [child.poll() for child in children]


def test_fillers_are_no_tokens(group):
    padded = {"input_ids": torch.ones(3, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])}
    assert int(metrics.count_tokens(padded)) == 5
    laid = {"input_ids": torch.ones(1, 7), "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 0]])}
    assert int(metrics.count_tokens(laid)) == 5
    rows = [{"input_ids": [1] * n, "labels": [-100] * n} for n in (3, 1, 2, 1)]
    assert int(metrics.count_tokens(collators.PaddingFreeCollator(0, 3)(rows))) == 5
    assert int(metrics.count_tokens(collators.PaddingFreeCollator(0, 9, lengths=(16,), rows=6)(rows))) == 5


def test_epochs_are_counted_by_rows_and_not_by_fillers(group):
    # 11 rows in passes of 1 are 3 passes on each of 4 processes, the last of them with 3 rows.
    assert [round(samplers.epochs_done(n / 3, 11, 1) * 11) for n in (0, 1, 2, 3, 4)] == [0, 4, 8, 11, 15]


@pytest.mark.parametrize(
    ("options", "processes", "fix"),
    [
        ({"per_device_train_batch_size": 2}, 8, "trainer.per_device_train_batch_size=1 trainer.effective_batch_size=8"),
        ({"effective_batch_size": 6}, 4, "trainer.effective_batch_size=8 "),
        ({"per_device_train_batch_size": "auto", "effective_batch_size": 3}, 2, "trainer.effective_batch_size=4 "),
    ],
)
def test_a_step_that_cannot_be_shared_out_is_refused(options, processes, fix):
    (problem,) = check_batch_plan(TrainerSettings(**options), processes)
    assert f"among {processes} processes" in problem.why and fix in problem.fix
    assert check_batch_plan(TrainerSettings(**options), 1) == []
    argv = [f"trainer.{key}={value}" for key, value in options.items()]
    type_hints(argv, [problem], lambda command: check_batch_plan(make_settings(*command).trainer, processes))


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["distributed.num_processes=0"], "distributed.num_processes=0"),
        (["distributed.num_processes=many"], "distributed.num_processes=many"),
        (["distributed=ddp"], "distributed.num_processes=auto"),
        (["distributed.strategy=fsdp"], "distributed.strategy=fsdp"),
        (
            ["distributed=fsdp", "distributed.num_processes=2", "model.backend=unsloth"],
            "distributed.strategy=fsdp model.backend=unsloth",
        ),
        (["distributed.num_processes=2", "trainer.extra.dataloader_drop_last=true"], "trainer.extra.dataloader_drop_last=true"),
        (["trainer.extra.fsdp=full_shard"], "trainer.extra.fsdp=full_shard"),
    ],
)
def test_what_cannot_work_is_refused(overrides, what):
    (problem,) = check_settings(make_settings("tracking=none", *overrides))
    assert problem.what == what and problem.fix
