"""How several processes train together through accelerate: each with the whole model (`ddp`) or with a share of it (`fsdp`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.schema import Settings, Strategy
from sft.distributed.group import rank, world_size
from sft.errors import refuse


def shards(settings: Settings) -> bool:
    """Whether each process has only a share of the weights, so that a forward pass needs all of them."""
    return world_size() > 1 and settings.distributed.strategy == Strategy.fsdp


def check_checkpoint(checkpoint: Path | None, settings: Settings) -> None:
    """Raise Refusal if processes with shares of the weights would go on from a checkpoint without, or the other way round."""
    shared = checkpoint is not None and (checkpoint / "pytorch_model_fsdp.bin").exists()
    if checkpoint is not None and shared != shards(settings):
        was, now = ("fsdp", "ddp") if shared else ("ddp", "fsdp")
        why = f"{checkpoint.name.replace('-', ' ')} was written with distributed.strategy={was}, in another form."
        fix = "distributed.num_processes=2" if shared else "distributed.strategy=ddp"
        if shared and settings.distributed.strategy != Strategy.fsdp:
            fix = f"distributed.strategy=fsdp {fix}"
        raise refuse(f"distributed.strategy={now}" if world_size() > 1 else "one process", why, fix)


def training_options(settings: Settings, checkpointing: bool) -> dict[str, Any]:
    """What transformers' TrainingArguments need besides, where there are several processes."""
    if world_size() == 1:
        return {}
    if shards(settings):
        import torch

        # TRL's own loss in chunks passes the output layer by, and torch before 2.13 then loses track of where its weights are.
        plain = {} if torch.torch_version.TorchVersion(torch.__version__) >= (2, 13) else {"loss_type": "nll"}
        # Whole weights in a checkpoint, not shares, so that another number of processes can go on from it.
        options = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": checkpointing}
        return {"fsdp": True, "fsdp_config": options, "gradient_checkpointing": False, **plain}
    # Every trained weight is used in each micro-batch, so that none has to be searched for that is not; and no buffer of a
    # frozen model changes, so that none has to be sent around before each.
    return {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}


def settle_accelerator(accelerator: Any, model: Any) -> None:
    """Let a gradient be a view of what is averaged over the ranks, not a copy of it; where each has a share of the weights, let
    gradients be added up in float32 and a loss stay what it is: accelerate rounds both to the 16 bits that are computed in.

    The weights of FP8 layers are left out where the first rank sends its weights to the others: all elements of such a weight
    are one place in the memory, which torch refuses to write to.
    """
    import torch

    model._ddp_params_and_buffers_to_ignore = [name for name, weight in model.named_parameters() if 0 in weight.stride()]

    if handler := getattr(accelerator, "ddp_handler", None):
        handler.gradient_as_bucket_view = True
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin and plugin.mixed_precision_policy:
        policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
        plugin.mixed_precision_policy = policy


def settle_device(args: Any) -> None:
    """Let a process have one GPU, and call the CPU by its plain name.

    transformers gives a process that is alone all GPUs it sees, with as many times the rows a micro-batch. accelerate gives the
    CPU the rank's number (`cpu:1`), under which torch.load reads nothing.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1
    if world_size() > 1 and args.device.type == "cpu":
        import torch
        from accelerate.state import DistributedType, PartialState

        args.__dict__["_setup_devices"] = torch.device("cpu")  # where `args.device` is kept
        if args.fsdp:  # torch shards on the CPU too, but accelerate asks it to only where it sees GPUs
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def spread_random_state(seed: int) -> None:
    """Another dropout on each rank, once everything that has to be the same everywhere was drawn."""
    if rank():
        import torch

        torch.manual_seed(seed + rank())
