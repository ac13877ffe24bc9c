"""Layers that get an adapter by default, of model families that name theirs otherwise than Llama."""

from typing import Any

from sft.config.schema import LoraSettings

DEFAULT = LoraSettings().target_modules

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

EXPERTS = "the experts, which are parameters and no layers, are left out"

DELTA = [*DEFAULT, "in_proj_qkv", "in_proj_z", "out_proj"]

# Layers of the parts for images and sound have the names of the text's. They get no gradient, and Gemma 4's are of a kind that
# PEFT has no adapter for.
TEXT_PART = [r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"]

# The gates in_proj_a, in_proj_b and in_proj_ba are left out: they have a column for each head, fewer than an adapter's rank.
OWN = {
    "gemma3": TEXT_PART,
    "gemma4": TEXT_PART,
    "glm4": [*ATTENTION, "gate_up_proj", "down_proj"],
    "gpt_oss": ATTENTION,
    "lfm2": ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"],
    "mixtral": ATTENTION,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), DELTA),
    "qwen3_moe": ATTENTION,
    "qwen3_next": [*DEFAULT, "in_proj_qkvz", "out_proj"],
}
"""By `model_type` of a config.json: the linear layers of token mixers and feed-forward blocks."""

MIXTURES = ("gpt_oss", "mixtral", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next")


def own_targets(config: dict[str, Any]) -> tuple[list[str] | None, str]:
    """(the targets of the family that a config.json names, why they are taken); (None, "") where the default list is right."""
    family = config.get("model_type")
    if family not in OWN:
        return None, ""
    return list(OWN[family]), f"{family}'s own layers" + (f"; {EXPERTS}" if family in MIXTURES else "")
