"""What `model.load_in_fp8` cannot be combined with."""

from sft.config.keys import typed
from sft.config.lora_rules import changes_base
from sft.config.schema import Backend, Dtype, Settings, Strategy
from sft.errors import Problem

WHAT = "model.load_in_fp8=true"

OFF = "model.load_in_fp8=false"


def check_fp8(settings: Settings) -> list[Problem]:
    """What rounding the frozen weights to FP8 is in the way of."""
    model, lora = settings.model, settings.lora
    if not model.load_in_fp8:
        return []
    problems = [
        Problem(f"{key}=true {WHAT}", "Weights are loaded one way only.", f"{key}=false   or   {OFF}")
        for key, chosen in (("model.load_in_4bit", model.load_in_4bit), ("model.load_in_8bit", model.load_in_8bit))
        if chosen
    ]

    def refuse(what: str, why: str, fix: str) -> None:
        problems.append(Problem(f"{what} {WHAT}", why, f"{fix}   or   {OFF}"))

    if model.backend == Backend.unsloth:
        refuse("model.backend=unsloth", "Unsloth's kernels take the weights as they are.", "model.backend=auto")
    if model.dtype in (Dtype.float16, Dtype.float32):
        why = "Products of FP8 weights come out in bfloat16."
        refuse(f"model.dtype={model.dtype.value}", why, "model.dtype=auto")
    if settings.distributed.strategy == Strategy.fsdp:
        refuse("distributed.strategy=fsdp", "FP8 weights are not shared out: each GPU would hold all of them.",
               "distributed.strategy=ddp")  # fmt: skip
    if not lora.enabled:
        refuse("lora=none", "Rounded weights cannot be trained themselves; they need an adapter.", "lora=default")
        return problems
    if lora.use_dora:
        refuse("lora.use_dora=true", "DoRA computes with the weights themselves, not only with their products.",
               "lora.use_dora=false")  # fmt: skip
    if changes_base(lora):
        why = "It takes the adapter's start out of the weights, and what is left would be rounded anew."
        refuse(typed("lora.extra.init_lora_weights", lora.extra["init_lora_weights"]), why, "lora.extra.init_lora_weights=true")
    if whole := [name for name in lora.modules_to_save if name not in ("lm_head", "embed_tokens") and "norm" not in name]:
        refuse(typed("lora.modules_to_save", whole), "Rounded weights cannot be trained themselves.",
               "lora.modules_to_save=[lm_head,embed_tokens]")  # fmt: skip
    if lora.extra.get("target_parameters"):
        refuse(typed("lora.extra.target_parameters", lora.extra["target_parameters"]),
               "An adapter on a parameter computes with the weights themselves.", "lora.extra.target_parameters=[]"
        )  # fmt: skip
    return problems
