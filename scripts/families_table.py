"""Write the tables of families and presets into docs/model.md, between their marks.

python scripts/families_table.py            write them
python scripts/families_table.py --check    exit 1 if they are out of date

What a test shows of a family stands in FAMILIES, which tests/integration/test_families.py and test_families_gguf.py read too.
Its layers are those of sft/plan/families.py, what a preset is stands in its file, and memory is the estimate of
sft/plan/memory.py.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.plan import families

TARGET = ROOT / "docs" / "model.md"
BEGIN, END = "<!-- by scripts/families_table.py -->", "<!-- until here -->"

PROVEN, REFUSED, NOT_TRIED, TRIED = "proven", "refused", "not tried", "tried"
WITH_WORDS = "proven with Qwen2.5's tokenizer"
"""Where `tests/fetch_tokenizers.py` has brought that: the converter knows its words by the whole vocabulary."""


@dataclass(frozen=True)
class Family:
    """What tests show of a family."""

    gguf: str = PROVEN
    padded: str = ""
    """Why its rows are padded."""
    graphs: str = NOT_TRIED
    """Whether tests/gpu tries CUDA graphs, which need padding-free rows."""
    presets: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """With what its config has to say for the estimate, where that is known."""


def _shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A config of these sizes; `heads` are those of queries and of keys."""
    return dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads[0], num_key_value_heads=heads[1], pad_token_id=0, **more)  # fmt: skip


TIED = {"tie_word_embeddings": True}
LLAMA_8B = _shape(128256, 4096, 14336, 32, (32, 8))
QWEN2_7B = _shape(152064, 3584, 18944, 28, (28, 4))


# Those of Qwen3.5 and Gemma 4 as several public repositories state them of the hub's config.json; of Qwen3.5 9B they are the
# defaults of transformers' Qwen3_5TextConfig, and the parts for images and sound of Gemma 4 are those of its configs.
def _hybrid(hidden: int, inner: int, layers: int, heads: tuple[int, int], value_heads: int) -> dict[str, Any]:
    """The text part of a Qwen3.5, whose width is given to the part for images too."""
    text = _shape(248320, hidden, inner, layers, heads, head_dim=256, linear_num_key_heads=16,
                  linear_num_value_heads=value_heads, tie_word_embeddings=hidden < 4096)  # fmt: skip
    return {"text_config": text, "vision_config": {"out_hidden_size": hidden}}


def _gemma4(hidden: int, inner: int, layers: int, keys: int, shared: int, every: int) -> dict[str, Any]:
    """A Gemma 4 with `shared` layers that take keys and values of others; one in `every` layers attends to all tokens."""
    kinds = ["full_attention" if n % every == every - 1 else "sliding_attention" for n in range(layers)]
    text = _shape(262144, hidden, inner, layers, (8, keys), head_dim=256, global_head_dim=512, layer_types=kinds,
                  num_kv_shared_layers=shared, use_double_wide_mlp=hidden < 2048, final_logit_softcapping=30.0)  # fmt: skip
    return {"text_config": text, "vision_config": {}, "audio_config": {}}


FAMILIES = {
    "llama": Family(graphs=TRIED, presets={
        "smollm2_135m": _shape(49152, 576, 1536, 30, (9, 3), **TIED),
        "llama3_2_1b_instruct": _shape(128256, 2048, 8192, 16, (32, 8), head_dim=64, **TIED),
        "llama3_2_3b_instruct": _shape(128256, 3072, 8192, 28, (24, 8), **TIED),
        "llama3_8b": LLAMA_8B, "llama3_1_8b": LLAMA_8B, "llama3_1_8b_instruct": LLAMA_8B,
    }),
    "mistral": Family(presets={"mistral_7b": _shape(32768, 4096, 14336, 32, (32, 8))}),
    "qwen2": Family(gguf=WITH_WORDS, presets={"qwen2_5_7b_instruct": QWEN2_7B, "deepseek_r1_distill_qwen_7b": QWEN2_7B}),
    "qwen3": Family(presets={
        "qwen3_4b": _shape(151936, 2560, 9728, 36, (32, 8), head_dim=128, **TIED),
        "qwen3_8b": _shape(151936, 4096, 12288, 36, (32, 8), head_dim=128),
    }),
    "smollm3": Family(presets={"smollm3_3b": _shape(128256, 2048, 11008, 36, (16, 4), **TIED)}),
    "granite": Family(),
    "phi3": Family(presets={"phi4_mini_instruct": _shape(200064, 3072, 8192, 32, (24, 8), **TIED)}),
    "ministral3": Family(gguf=REFUSED),
    "gemma3_text": Family(),
    "gemma3": Family(presets={"gemma3_4b_it": {
        "text_config": _shape(262208, 2560, 10240, 34, (8, 4), head_dim=256),
        "vision_config": dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                              image_size=896, patch_size=14)}}),
    "gemma4": Family(gguf=REFUSED, presets={
        "gemma4_e2b_it": _gemma4(1536, 6144, 35, 1, 20, 5), "gemma4_e4b_it": _gemma4(2560, 10240, 42, 2, 18, 6)}),
    "qwen3_5": Family(padded="its convolutions run from one row into the next",
                      presets={"qwen3_5_0_8b": _hybrid(1024, 3584, 24, (8, 2), 16),
                               "qwen3_5_2b": _hybrid(2048, 6144, 24, (8, 2), 16),
                               "qwen3_5_4b": _hybrid(2560, 9216, 32, (16, 4), 32),
                               "qwen3_5_9b": _hybrid(4096, 12288, 32, (16, 4), 32)}),
    "lfm2": Family(padded="its convolutions run from one row into the next", presets={
        "lfm2_5_1_2b_instruct": _shape(65536, 2048, 12288, 16, (32, 8), layer_types=["conv"] * 10 + ["full_attention"] * 6)}),
    "qwen3_moe": Family(presets={
        "qwen3_30b_a3b_instruct": _shape(151936, 2048, 6144, 48, (32, 4), head_dim=128, num_experts=128, num_experts_per_tok=8,
                                         moe_intermediate_size=768)}),
    "gpt_oss": Family(padded="its attention has sinks, which padding-free attention does not", presets={
        "gpt_oss_20b": _shape(201088, 2880, 2880, 24, (64, 8), head_dim=64, num_local_experts=32, num_experts_per_tok=4)}),
}  # fmt: skip
"""By `model_type` of a config.json."""

LENGTH = 2048


def main(argv: list[str]) -> int:
    """Write the tables, or with `--check` compare them; returns the exit code."""
    text = TARGET.read_text(encoding="utf-8")
    page = with_tables(text)
    if "--check" in argv:
        if page != text:
            print("docs/model.md is out of date: python scripts/families_table.py", file=sys.stderr)
        return 0 if page == text else 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """The guide `text` with the tables between its marks."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{_families()}\n\n{_presets()}\n\n{END}{after}"


def layers_of(family: str) -> str:
    """The layers of a family that get an adapter by default, in words."""
    own = families.OWN.get(family)
    if own in (None, families.TEXT_PART):
        return "the seven" + " of its text part" * (own == families.TEXT_PART)
    return ", ".join(f"`{name}`" for name in own)


def _families() -> str:
    rows = [(f"`{name}`", ", ".join(f"`{preset}`" for preset in one.presets) or "none", layers_of(name),
             f"padded: {one.padded}" if one.padded else "padding-free", "no" if one.padded else one.graphs, one.gguf)
            for name, one in FAMILIES.items()]  # fmt: skip
    return _table(["family", "presets", "an adapter on", "rows", "CUDA graphs", "GGUF"], rows)


def _presets() -> str:
    rows = []
    for family, one in FAMILIES.items():
        for preset, shape in one.presets.items():
            text = (ROOT / "conf" / "model" / f"{preset}.yaml").read_text(encoding="utf-8")
            found = memory_of(family, shape, bool(one.padded)) if shape else ("not known", "not known", "not known")
            packed = found[1] if "load_in_4bit: true" in text else "not in 4 bits"
            rows.append((f"`model={preset}`", found[0], packed, found[2], _thinking(text)))
    return _table(["preset", "weights, billions", "GiB in 4 bits", "GiB in 16 bits", "thinks"], rows)


def memory_of(family: str, shape: dict[str, Any], padded: bool) -> tuple[str, str, str]:
    """(billions of weights, GiB in 4 bits, GiB in 16) of one row of LENGTH tokens, recomputed, with the default adapter on
    what is trained."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from sft.config.schema import LoraSettings, Settings
    from sft.model.dims import dims_of
    from sft.plan.memory import LoadPlan, estimate
    from sft.plan.plan import WIDEST

    config = CONFIG_MAPPING[family](**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dims = dims_of(model, config, Settings(lora=LoraSettings(target_modules=families.OWN.get(family, families.DEFAULT))))
    padded = padded or dims.widest_head > WIDEST
    loads = [LoadPlan("transformers", bits, padding_free=not padded, padded=padded, chunked=padded) for bits in (4, 16)]
    needed = (f"{estimate(dims, load, 1, LENGTH).needed:.1f}" for load in loads)
    return f"{dims.parameters / 1e9:.2f}", *needed


def _thinking(text: str) -> str:
    """What the comments of a preset's file say of thinking."""
    about = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    if another := re.search(r"as (\w+), larger", about):
        return _thinking((ROOT / "conf" / "model" / f"{another[1]}.yaml").read_text(encoding="utf-8"))
    if re.search(r"thinks? before it answers unless told not to", about):
        return "unless told not to"
    return "yes" if re.search(r"thinks? before it answers", about) else "no" if "without thinking" in about else ""


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
