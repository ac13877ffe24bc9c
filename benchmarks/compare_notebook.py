"""Measure `experiment=colab_notebook` against a plain script that does what the notebook does, in one session.

    python benchmarks/compare_notebook.py --model DIR --data rows.json --out DIR [--load-in-4bit] [--steps 60] [--pairs 2]

Runs the two in turn (A B B A ...), each in a process of its own, and prints, for every run: the median seconds a step after
ten steps of warm-up, the non-padding tokens a second over the same steps, the peak memory, and the largest difference
between the two loss curves. Needs a GPU and Unsloth. Both train on the same rows in the same order.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 10


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bits = "4bit" if args.load_in_4bit else "bf16"
    results: dict[str, list[dict]] = {"notebook": [], "ours": []}
    for pair in range(args.pairs):
        # Each goes first in turn, so that neither always finds the warmer machine.
        for who in ("ours", "notebook") if pair % 2 == 0 else ("notebook", "ours"):
            measure = run_ours if who == "ours" else run_notebook
            results[who].append(measure(args, args.out / f"{bits}_{pair}_{who}"))
    tokens = results["ours"][0]["tokens"]
    print(f"\n{bits}, {args.steps} steps of 2 x 4 rows; seconds a step: median after {WARM_UP} steps")
    print(f"{'run':<12} {'s/step':>8} {'tokens/s':>9} {'reserved GiB':>13} {'allocated GiB':>14} {'last loss':>10}")
    for pair in range(args.pairs):
        for who in ("notebook", "ours"):
            r = results[who][pair]
            rate = sum(tokens[WARM_UP:]) / sum(r["seconds"][WARM_UP:])
            median = statistics.median(r["seconds"][WARM_UP:])
            memory = f"{r['peak_reserved_gib']:>13.2f} {r['peak_allocated_gib']:>14.2f}"
            print(f"{who:<12} {median:>8.3f} {rate:>9.0f} {memory} {r['losses'][-1]:>10.4f}")
        difference = max(
            abs(a - b) for a, b in zip(results["notebook"][pair]["losses"], results["ours"][pair]["losses"], strict=True)
        )
        print(f"largest difference between the loss curves: {difference:.4f}")
    (args.out / f"{bits}.json").write_text(json.dumps(results), encoding="utf-8")


def run_notebook(args: argparse.Namespace, out: Path) -> dict:
    """One run of notebook_baseline.py."""
    command = [sys.executable, str(ROOT / "benchmarks/notebook_baseline.py"), "--model", args.model, "--data", args.data]
    command += ["--out", f"{out}.json", "--steps", str(args.steps), *(["--load-in-4bit"] if args.load_in_4bit else [])]
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))


def run_ours(args: argparse.Namespace, out: Path) -> dict:
    """One run of train.py; seconds and tokens a step come from its metrics.jsonl."""
    command = [
        *(sys.executable, str(ROOT / "train.py"), "experiment=colab_notebook"),
        *(f"model.name={args.model}", "model.backend=unsloth", f"model.load_in_4bit={str(args.load_in_4bit).lower()}"),
        *(f"dataset.path={args.data}", f"trainer.max_steps={args.steps}", f"hydra.run.dir={out}"),
        *("samples.num_held_out=2", "samples.max_new_tokens=16"),
    ]
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]
    tokens = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *lines], lines, strict=False)]
    seconds = [n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True)]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": seconds,
        "tokens": tokens,
        "peak_allocated_gib": json.loads((out / "run.json").read_text(encoding="utf-8"))["metrics"]["memory_allocated_gib"],
        "peak_reserved_gib": max(line["memory_gib"] for line in lines),
    }


if __name__ == "__main__":
    main()
