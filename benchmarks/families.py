"""Speed and memory of model families with random weights: this project, its estimate of the memory, and a peer.

    python benchmarks/families.py --shape hybrid --out DIR                     on a GPU, about 3 minutes
    python benchmarks/families.py --shape moe --layers 48 --out DIR --overrides trainer.torch_compile=true
    python benchmarks/families.py --shape llama_8b --make DIR                  only the model, for the other programs
    python benchmarks/families.py --shape tiny_hybrid,tiny_moe,tiny_gpt_oss --words 24 --steps 4 --warm-up 1 --out DIR

hybrid: what transformers' Qwen3_5TextConfig calls Qwen3.5-9B style, its defaults: 8.95 B weights, three layers in four a gated
delta net. moe: Qwen3-30B-A3B with 24 of its 48 layers (15.6 B of 30.5 B; `--layers 48` for all: 61 GB on the disk).
gpt_oss: gpt-oss-20b in bfloat16, 20.9 B. llama_8b: Llama 3 8B. No weights of the hub were compared with these sizes. tiny_*:
the same code with some two million weights, for the CPU.

One after the other: a folder with the model (written by a process of its own, removed at the end unless `--keep`), rows of
make_rows.py, `--steps` steps of 8 rows through train.py with the default adapter, and the same through `--peers` with that
run's layers and checkpointing. A part that fails prints the end of its log, and the others go on. Tokens a second are those
of speed.py, which measures. The estimate is that of sft/plan/memory.py for the largest micro-batch that there was, captured
steps not counted besides: eager ones give their memory back before a capture. Writes families.json and families.md after each
measurement.
"""

import argparse
import datetime
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peer, speed

ROWS = 8
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<unk>"]
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY = dict(vocab_size=16384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **HEADS)
STATES = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": ("qwen3_5_text", {}),
    "moe": ("qwen3_moe", dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, head_dim=128,
                              num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
                              moe_intermediate_size=768)),
    "gpt_oss": ("gpt_oss", dict(num_hidden_layers=24, num_local_experts=32)),
    "llama_8b": ("llama", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                               num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)),
    "tiny_hybrid": ("qwen3_5_text", dict(TINY, **STATES, layer_types=["linear_attention", "full_attention"])),
    "tiny_moe": ("qwen3_moe", dict(TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    "tiny_gpt_oss": ("gpt_oss", dict(TINY, num_local_experts=4, num_experts_per_tok=2, sliding_window=64)),
}  # fmt: skip
"""By name, the `model_type` and what its config has beside its defaults."""


def main(argv: list[str] | None = None) -> None:
    """Measure each shape and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help=", ".join(SHAPES))
    parser.add_argument("--out", type=Path, help="a folder for all that is written")
    parser.add_argument("--layers", type=int, help="of the model, other than its shape says")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--words", type=int, help="as many in every row")
    parser.add_argument("--peers", default="trl", help="trl, unsloth, both or none, separated by commas")
    parser.add_argument("--overrides", default="", help="for ours, separated by spaces")
    parser.add_argument("--keep", action="store_true", help="the model's folder, which a later call takes as it is")
    parser.add_argument("--make", type=Path, help="a folder for the model of one shape, and nothing is measured")
    args = parser.parse_args(argv)
    if args.make:
        return make_model(args.shape, args.layers, args.make)
    if not args.out:
        parser.error("--out or --make is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = str((args.out / "rows.json").absolute())
    make_rows(args)
    facts = {"date": f"{datetime.date.today()}", "hardware": speed.hardware(), "versions": speed.versions()}
    facts["command"] = " ".join(["families.py", *(sys.argv[1:] if argv is None else argv)])
    kept = json.loads(speed.read(args.out / "families.json") or "{}").get("results", {})
    results: dict[str, dict[str, Any]] = {**kept}
    for shape in args.shape.split(","):
        results[shape] = {}
        for name, found in measure(args, shape):
            results[shape][name] = found
            (args.out / "families.json").write_text(json.dumps({**facts, "results": results}), encoding="utf-8")
            (args.out / "families.md").write_text(table(facts, results, args.warm_up), encoding="utf-8")
    print((args.out / "families.md").read_text(encoding="utf-8"), flush=True)


def measure(args: argparse.Namespace, shape: str):
    """Yield the name of each measurement of a shape and what was found, printed as it comes."""
    folder, began = (args.out / f"model_{shape}").absolute(), time.time()
    args.model = str(folder)
    if not (folder / "config.json").is_file():
        command = [sys.executable, str(ROOT / "benchmarks/families.py"), "--shape", shape, "--make", str(folder)]
        command += [*(["--layers", str(args.layers)] if args.layers else [])]
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        print(f"{shape:<14} written in {time.time() - began:.0f} s", flush=True)
        if done.returncode:
            found = {"error": speed.read(Path(f"{folder}.log"))[-1500:]}
            print(f"{shape:<14} {speed.line_of(found, 0)}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            yield "model", found
            return
    try:
        place = args.out / f"{shape}_ours"
        shutil.rmtree(place, ignore_errors=True)
        way = (ROWS, 1, ("model.backend=transformers", "model.load_in_4bit=false"))
        found = timed(args, f"{shape} ours", speed.measure_ours, way, place)
        plan = {}
        if "error" not in found:
            try:
                plan = facts_of(place)
                print(json.dumps(plan), flush=True)
            except Exception as error:  # whatever a shape's estimate ends with: its speed is known
                plan = {"why_no_facts": f"{type(error).__name__}: {error}"}
                print(plan["why_no_facts"], flush=True)
        yield "ours", {**found, **plan}
        for library in filter(None, args.peers.split(",")):
            options = ("--optim=adamw_torch_fused", f"--targets={','.join(plan.get('targets') or peer.TARGETS)}")
            options += ("--checkpointing",) if plan.get("checkpointing") else ()
            way = (library, ROWS, 1, options)
            yield library, timed(args, f"{shape} {library}", speed.measure_peer, way, args.out / f"{shape}_{library}")
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def timed(args: argparse.Namespace, label: str, measure: Any, way: tuple, place: Path) -> dict[str, Any]:
    """One measurement of speed.py, printed; what it raises becomes its error."""
    began = time.time()
    try:
        found = measure(args, way, args.steps, place)
    except Exception as error:  # one that ended well and left no figures
        found = {"error": f"{type(error).__name__}: {error}"}
    print(f"{label:<26} {speed.line_of(found, args.warm_up)}   ({time.time() - began:.0f} s)", flush=True)
    return found


def facts_of(folder: Path) -> dict[str, Any]:
    """What a run folder says of its plan, and the memory that is estimated for the largest micro-batch that it had."""
    from sft.config.batching import BatchPlan
    from sft.config.compose import fill_settings
    from sft.config.hardware import CONTEXT
    from sft.model.dims import dims_of, empty_model
    from sft.plan import memory
    from sft.plan.machine import Machine
    from sft.plan.plan import Plan, closed, load_plan_of

    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    preflight = json.loads((folder / "preflight.json").read_text(encoding="utf-8"))
    plan = Plan(**{**record["plan"], "batch": BatchPlan(**record["plan"]["batch"])})
    settings = closed(fill_settings(record["settings"]), plan)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [0, *(line["tokens"] for line in lines if "loss" in line)]
    found = {
        "targets": settings.lora.target_modules, "checkpointing": plan.checkpointing, "speed": record["speed"],
        "coverage": preflight.get("coverage"), "preflight_memory": preflight.get("memory"),
        "rows_at_once": record["metrics"].get("rows_at_once"),  # after an OOM retry
    }  # fmt: skip
    dims = dims_of(*empty_model(settings, settings.model.name), settings)
    if dims is None:
        return found
    load = load_plan_of(settings, plan, Machine(gpu=record["plan"]["dtype"] != "float32"))
    tokens = max(b - a for a, b in itertools.pairwise(ends))  # of the largest step, which is one micro-batch
    rows, length = 1, min((size for size in plan.capture_sizes if size >= tokens), default=tokens)
    if not plan.padding_free:  # each row is in one of the steps, the longest one too
        rows, length = plan.batch.per_device_train_batch_size, preflight["lengths"]["train"]["max"]
    guess = memory.estimate(dims, load, rows, length)
    parts = {name: round(value, 2) for name, value in vars(guess).items()}
    return {**found, "billions": dims.parameters / 1e9, "tokens_at_once": rows * length, "estimate": parts,
            "estimated_gib": guess.needed - CONTEXT}  # fmt: skip


def table(facts: dict[str, Any], results: dict[str, dict[str, Any]], warm_up: int) -> str:
    """The Markdown table: a line for each shape, with the median step, and one for what failed."""
    heads = ["shape", "billions", "tokens/s", "s/step", "rows", "checkpointing", "peak GiB", "estimated", "x measured"]
    names = list(dict.fromkeys(name for runs in results.values() for name in runs if name not in ("ours", "model")))
    heads += [word for name in names for word in (f"{name} tokens/s", f"{name} GiB", f"x {name}")]
    out = [f"`{facts['command']}`, {facts['date']}, {facts['hardware']}; {facts['versions']}", ""]
    out += [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    failed = []
    for shape, runs in results.items():
        failed += [f"{shape} {name}: {run['error'].strip().splitlines()[-1:]}" for name, run in runs.items() if "error" in run]
        ours = runs.get("ours", {"error": ""})
        if "error" in ours:
            continue
        way, value = ours.get("speed") or {}, speed.rate(ours, warm_up)
        words = [word for word, on in (("padding-free", way.get("padding_free")), ("compiled", way.get("compiled")),
                                       ("captured", way.get("lengths"))) if on]  # fmt: skip
        guess, peak = ours.get("estimated_gib"), ours["peak_reserved_gib"]
        cells = [shape, f"{ours.get('billions', 0):.2f}", f"{value:.0f}", f"{statistics.median(ours['seconds'][warm_up:]):.3f}"]
        cells += [", ".join(words) or f"padded: {way.get('why_not')}", "yes" if ours.get("checkpointing") else "no"]
        cells += [f"{peak:.1f}", f"{guess:.1f}" if guess else "", f"{guess / peak:.2f}" if guess else ""]
        for name in names:
            run = runs.get(name, {"error": ""})
            its = None if "error" in run else speed.rate(run, warm_up)
            cells += [f"{its:.0f}", f"{run['peak_reserved_gib']:.1f}", f"{value / its:.2f}"] if its else ["failed", "", ""]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join([*out, *([""] if failed else []), *failed]) + "\n"


# ----------------------------------------------------------------------------------------------- the model and rows


def make_rows(args: argparse.Namespace) -> None:
    """As many rows as the steps take, so that each is in one of them."""
    command = [sys.executable, str(ROOT / "benchmarks/make_rows.py"), args.data, "--rows", str(args.steps * ROWS)]
    subprocess.run(command + (["--words", str(args.words)] if args.words else []), check=True)


def make_model(shape: str, layers: int | None, folder: Path) -> None:
    """A model of this shape with random bf16 weights (float32 on the CPU), and a tokenizer with a token for each word."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family, sizes = SHAPES[shape]
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config = CONFIG_MAPPING[family](**{**sizes, **ends, **({"num_hidden_layers": layers} if layers else {})})
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    write_tokenizer(folder)
    # Experts stay together, as they are in memory: the hub's files have a tensor for each, which take minutes to read.
    model.save_pretrained(folder, max_shard_size="4GB", save_original_format=False)


def write_tokenizer(folder: Path) -> None:
    """A token for each of w0 ... w7999, with and without the space before it, and for the end of a line."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*SPECIAL, "\n", *(f"{space}w{i}" for space in ("", " ") for i in range(8000))]
    words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token=SPECIAL[3]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ \n]+|\n"), "isolated")
    words.decoder = decoders.Fuse()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8192, **names).save_pretrained(folder)


if __name__ == "__main__":
    main()
