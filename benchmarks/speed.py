"""Training speed of this project beside its peers: the same model, rows and effective batch, in one session.

    python benchmarks/speed.py --model DIR --data rows.json --out DIR                      everything, once
    python benchmarks/speed.py ... --only ours_bf16_8:200,unsloth_bf16_8,notebook          some; of ours 200 steps, not 60
    python benchmarks/speed.py --cpu --data ruozhiba_qa.json --out DIR                     SmolLM2 on this machine's CPU

Every measurement is a process of its own. Seconds are those of whole steps, from the end of one to the end of the next: data,
optimiser and logging included. Tokens a second are non-padding tokens over these seconds after `--warm-up` steps; beside the
median of the steps stands the spread of their middle half. Writes speed.json and speed.md with date, hardware and versions
after each measurement; what is there already from the same hardware and versions stays in the table.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BF16 = ("model.backend=transformers", "model.load_in_4bit=false", "trainer.gradient_checkpointing=false")
NF4 = ("model.backend=transformers", "model.load_in_4bit=true", "trainer.gradient_checkpointing=false")
FP8 = (*BF16, "model.load_in_fp8=true")
COMPILED = ("trainer.torch_compile=true",)  # which a run of 500,000 tokens gets by itself
OURS = {
    "ours_bf16_8": (8, 1, BF16),
    "ours_bf16_32": (32, 1, BF16),
    "ours_nf4_8": (8, 1, NF4),
    "ours_nf4_32": (32, 1, NF4),
    "ours_bf16_8_compiled": (8, 1, BF16 + COMPILED),
    "ours_bf16_32_compiled": (32, 1, BF16 + COMPILED),
    "ours_nf4_8_compiled": (8, 1, NF4 + COMPILED),
    "ours_nf4_32_compiled": (32, 1, NF4 + COMPILED),
    "ours_fp8_8_compiled": (8, 1, FP8 + COMPILED),
    "ours_fp8_32_compiled": (32, 1, FP8 + COMPILED),
    "ours_auto_8": (None, None, ()),
    "ours_cpu": (2, 4, ()),
}
PEERS = {
    "notebook": ("unsloth", 2, 4, ("--load-in-4bit", "--checkpointing")),
    "unsloth_nf4_8": ("unsloth", 8, 1, ("--load-in-4bit",)),
    "unsloth_nf4_8_checkpointing": ("unsloth", 8, 1, ("--load-in-4bit", "--checkpointing")),
    "unsloth_bf16_8": ("unsloth", 8, 1, ()),
    "unsloth_bf16_32": ("unsloth", 32, 1, ()),
    "trl_bf16_8": ("trl", 8, 1, ("--optim=adamw_torch_fused",)),
    "trl_cpu": ("trl", 2, 4, ()),
}
ON_CPU = ("ours_cpu", "trl_cpu")


def main() -> None:
    """Measure, in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cpu", action="store_true", help="SmolLM2 on this machine's CPU")
    parser.add_argument("--only")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--overrides", default="", help="for ours, separated by spaces")
    args = parser.parse_args()
    args.data = str(Path(args.data).absolute())
    if args.cpu:
        from sft.model import builtin

        args.model = str(builtin.local_model(args.model, weights=True) or args.model)
        args.only, args.steps, args.warm_up = args.only or ",".join(ON_CPU), args.steps or 8, args.warm_up or 2
    args.only, args.steps, args.warm_up = (
        args.only or ",".join(name for name in [*OURS, *PEERS] if name not in ON_CPU),
        args.steps or 60,
        args.warm_up or 25,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"date": f"{datetime.date.today()}", "hardware": hardware(), "versions": versions()}
    kept = json.loads(read(args.out / "speed.json") or "{}")
    results: dict[str, list[dict]] = kept["results"] if facts.items() <= kept.items() else {}
    facts["command"] = " ".join(sys.argv)
    for turn in range(args.rounds):
        names = args.only.split(",")
        for label in names if turn % 2 == 0 else names[::-1]:
            place = args.out / f"{label.replace(':', '_')}_{len(results.get(label, []))}"
            name, _, steps = label.partition(":")
            began = time.time()
            measure, ways = (measure_ours, OURS) if name in OURS else (measure_peer, PEERS)
            found = measure(args, ways[name], int(steps or args.steps), place)
            results.setdefault(label, []).append(found)
            print(f"{label:<26} {line_of(found, args.warm_up)}   ({time.time() - began:.0f} s)", flush=True)
            (args.out / "speed.json").write_text(json.dumps({**facts, "results": results}), encoding="utf-8")
            (args.out / "speed.md").write_text(table(facts, results, args.warm_up), encoding="utf-8")


def measure_ours(args: argparse.Namespace, way: tuple, steps: int, place: Path) -> dict:
    """One run of train.py in a way of OURS; the times are those of its metrics.jsonl as it grows."""
    rows, passes, options = way
    split = (f"trainer.per_device_train_batch_size={rows}", f"trainer.gradient_accumulation_steps={passes}") if rows else ()
    command = [
        *(sys.executable, str(ROOT / "train.py"), f"model.name={args.model}", "model.max_seq_length=2048", "dataset=local"),
        *(f"dataset.path={args.data}", "dataset.template=alpaca", "dataset.loss_on=all", "dataset.eval_fraction=0"),
        *("lora.r=16", "lora.lora_alpha=16", f"trainer.max_steps={steps}", "trainer.learning_rate=2e-4", "seed=3407"),
        *(
            f"trainer.save_steps={steps}",
            "samples.num_held_out=0",
            "tracking=none",
            *split,
            *options,
            *args.overrides.split(),
        ),
        f"hydra.run.dir={place}",
    ]
    began = time.time()
    with open(f"{place}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        first = saved = None
        while process.poll() is None:
            if first is None and '"loss"' in read(place / "metrics.jsonl"):
                first = time.time() - began
            if saved is None and (place / "adapter").is_dir():
                saved = time.time() - began
            time.sleep(0.02)
    if process.returncode:
        return {"error": read(Path(f"{place}.log"))[-1500:]}
    return {"first_step": first, "saved": saved, **steps_of(place)}


def steps_of(folder: Path) -> dict:
    """What the metrics.jsonl of a run says of its steps: losses of all; tokens and seconds of all but the first; peak GiB."""
    lines = [json.loads(line) for line in read(folder / "metrics.jsonl").splitlines()]
    lines = [line for line in lines if "loss" in line]
    tokens = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(lines)]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": [n / line["tokens_per_second"] for n, line in zip(tokens, lines[1:], strict=True)],
        "tokens": tokens,
        "peak_reserved_gib": max(line["memory_gib"] for line in lines),
    }


def measure_peer(args: argparse.Namespace, way: tuple, steps: int, place: Path) -> dict:
    """One run of peer.py in a way of PEERS."""
    library, rows, passes, options = way
    command = [sys.executable, str(ROOT / "benchmarks/peer.py"), library, "--model", args.model, "--data", args.data]
    command += ["--out", f"{place}.json", "--steps", str(steps), "--rows", str(rows), "--passes", str(passes), *options]
    with open(f"{place}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        return {"error": read(Path(f"{place}.log"))[-1500:]}
    return json.loads(read(Path(f"{place}.json")))


def read(path: Path) -> str:
    """The text of a file, or nothing where there is none yet."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def rate(found: dict, first: int) -> float:
    """Non-padding tokens a second, from a step on (or of the last ones: -24)."""
    return sum(found["tokens"][first:]) / sum(found["seconds"][first:])


def line_of(found: dict, warm_up: int) -> str:
    """One measurement in words."""
    if "error" in found:
        return "failed: " + found["error"]
    seconds = sorted(found["seconds"][warm_up:])
    spread = f"{seconds[len(seconds) // 4]:.3f}-{seconds[3 * len(seconds) // 4]:.3f}"
    words = [f"{rate(found, warm_up):7.0f} tokens/s", f"last 24 steps {rate(found, -24):.0f}"]
    words += [f"{statistics.median(seconds):.3f} s/step ({spread})", f"{found['peak_reserved_gib']:.1f} GiB"]
    return "   ".join([*words, f"first step {found['first_step']:.1f} s", f"saved {found['saved']:.1f} s"])


def table(facts: dict, results: dict[str, list[dict]], warm_up: int) -> str:
    """The Markdown table: the median run of each, and its ratio to the notebook's recipe and to each peer."""
    good = {name: [r for r in runs if "error" not in r] for name, runs in results.items()}
    rates = {name: statistics.median(rate(r, warm_up) for r in runs) for name, runs in good.items() if runs}
    peers = [name for name in rates if name.partition(":")[0] in PEERS]
    heads = ["run", "tokens/s", "last 24 steps", "s/step", "peak GiB", "first step, s", "adapter saved, s"]
    out = [f"`{facts['command']}`, {facts['date']}, {facts['hardware']}; {facts['versions']}", ""]
    out += [f"| {' | '.join(heads + [f'x {p}' for p in peers])} |", "|---|" + "---:|" * (len(heads) - 1 + len(peers))]
    for name, value in rates.items():
        run = min(good[name], key=lambda r: abs(rate(r, warm_up) - value))
        step = statistics.median(run["seconds"][warm_up:])
        cells = [name, f"{value:.0f}", f"{rate(run, -24):.0f}", f"{step:.3f}", f"{run['peak_reserved_gib']:.1f}"]
        cells += [f"{run['first_step']:.1f}", f"{run['saved']:.1f}", *(f"{value / rates[p]:.2f}" for p in peers)]
        out += [f"| {' | '.join(cells)} |"]
    return "\n".join(out) + "\n"


def hardware() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}"


def versions() -> str:
    """What was measured with what."""
    names = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
