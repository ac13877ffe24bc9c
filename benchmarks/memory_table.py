"""Peak GPU memory, estimated and measured, for a grid of model shapes, loadings and lengths.

    python benchmarks/memory_table.py --dry                     the estimates alone, on any machine
    python benchmarks/memory_table.py                           on a GPU: the whole grid, as a Markdown table
    python benchmarks/memory_table.py --shapes 1b --lengths 512,2048 --backends transformers --compiled

Each cell is a process of its own: a model with random weights in the shape of Llama 3 8B or Llama 3.2 1B, LoRA r 16 on all
seven projections, three steps of `--rows` rows of one length through this project's trainer. Measured is
`torch.cuda.max_memory_reserved`, estimated is `Estimate.reserved` of sft/plan/memory.py. Models are made under `--models` once:
16 GB and 2.5 GB. Through transformers rows lie end to end. A cell that runs out of memory is shown as such, and one whose
estimate is above `--most` GiB is left out.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
               head_dim=64, tie_word_embeddings=True),
}  # fmt: skip


def main() -> None:
    """Go through the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--shapes", default="8b,1b")
    parser.add_argument("--backends", default="unsloth,transformers")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--bits", default="4,16")
    parser.add_argument("--checkpointing", default="on,off")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--most", type=float, default=85.0)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "memory_table")
    args = parser.parse_args()
    print("| shape | backend | weights | checkpointing | rows x tokens | estimated GiB | measured GiB | off |")
    print("|---|---|---|---|---|---|---|---|")
    grid = [getattr(args, key).split(",") for key in ("shapes", "backends", "bits", "checkpointing", "lengths")]
    for shape, backend, bits, checkpointing, length in itertools.product(*grid):
        bits, length, on = int(bits), int(length), checkpointing == "on"
        guess = estimate(shape, backend, bits, on, args.rows, length, args.compiled)
        if guess > args.most:
            continue
        found = None if args.dry else measure(args, shape, backend, bits, on, length)
        words = "" if args.dry else "out of memory" if found is None else f"{found:.2f}"
        off = f"{100 * (guess / found - 1):+.0f} %" if found else ""
        print(f"| {shape} | {backend} | {'nf4' if bits == 4 else 'bf16'} | {checkpointing} "
              f"| {args.rows} x {length} | {guess:.2f} | {words} | {off} |", flush=True)  # fmt: skip


def make_config(shape: str):
    """The config of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=128256, max_position_embeddings=8192, bos_token_id=128000, eos_token_id=128001,
                       pad_token_id=128004, **SHAPES[shape])  # fmt: skip


def estimate(shape: str, backend: str, bits: int, checkpointing: bool, rows: int, length: int, compiled: bool) -> float:
    """GiB that torch should reserve without CUDA graphs: captured steps are given up where the memory runs short."""
    from sft.config import hardware
    from sft.plan import memory

    padding_free = backend == "transformers"
    load = memory.LoadPlan(
        backend, bits, checkpointing=checkpointing, padding_free=padding_free, compiled=padding_free and compiled
    )
    return memory.estimate(read_shape(shape), load, rows, length).needed - hardware.CONTEXT


@functools.cache
def read_shape(shape: str):
    """The numbers that the estimate takes, without any weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from sft.config.schema import Settings
    from sft.model import dims

    config = make_config(shape)
    with torch.device("meta"):
        return dims.dims_of(AutoModelForCausalLM.from_config(config), config, Settings())


def measure(args: argparse.Namespace, shape: str, backend: str, bits: int, checkpointing: bool, length: int) -> float | None:
    """Reserved GiB of a run of three steps; None if it ran out of memory."""
    model = args.models / shape
    if not (model / "config.json").is_file():
        make_model(shape, model)
    with tempfile.TemporaryDirectory() as place:
        rows = [{"text": " ".join(f"w{(7 * i + k) % 8000}" for k in range(length - 1))} for i in range(6 * args.rows)]
        (Path(place) / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        command = [
            sys.executable, str(ROOT / "train.py"), f"model.name={model}", f"model.backend={backend}", "dataset=local",
            f"dataset.path={place}/rows.jsonl", f"model.load_in_4bit={bits == 4}", f"model.max_seq_length={length + 8}",
            f"trainer.gradient_checkpointing={checkpointing}", f"trainer.per_device_train_batch_size={args.rows}",
            "trainer.gradient_accumulation_steps=1", "trainer.max_steps=3", "dataset.eval_fraction=0",
            "trainer.load_best_model_at_end=false", "samples.num_held_out=0", "tracking=none", f"hydra.run.dir={place}/run",
            "preflight.mode=skip", "model.dtype=bfloat16",
        ]  # fmt: skip
        command += ["trainer.cuda_graphs=false"] * (backend == "transformers")
        command += ["trainer.torch_compile=true"] * (args.compiled and backend == "transformers")
        done = subprocess.run(command, capture_output=True, text=True)
        record = json.loads((Path(place) / "run" / "run.json").read_text(encoding="utf-8"))
    if "rows_at_once" in record.get("metrics", {}) or (record.get("error") or {}).get("type") == "OutOfMemoryError":
        return None
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return record["metrics"]["memory_gib"]


def make_model(shape: str, folder: Path) -> None:
    """Random bf16 weights, and a tokenizer with a token for each of w0 ... w7999."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = make_config(shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    special = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8000)} | special, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = list(special)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=names[0], eos_token=names[1], pad_token=names[2], unk_token="w0"
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
