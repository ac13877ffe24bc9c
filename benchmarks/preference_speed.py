"""Preferences beside the peers: the same model, pairs and batch of 8 pairs, in turn on one GPU.

    python benchmarks/preference_speed.py --model DIR --out DIR
    python benchmarks/preference_speed.py --model DIR --out DIR --only ours,trl --steps 20 --rounds 2

`ours` trains as train.py does; `ours_unshared` with the prompt before each of the two answers; `trl` is TRL's DPOTrainer as its
documentation has it, `trl_fast` with its precomputed reference and liger's loss, `unsloth` the same trainer after Unsloth's
patch. LoRA r 16 on seven projections, bf16, no checkpointing. Every measurement is a process of its own. A step is timed from
the end of one to the end of the next; pairs a second are those of all steps after `--warm-up`. The pass over the
reference is not in it where it is made beforehand. Writes preference_speed.json and prints a table.
"""

import argparse
import itertools
import json
import random
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WAYS = ("ours", "ours_unshared", "trl", "trl_fast", "unsloth")
PAIRS = 8


def main() -> None:
    """Measure in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--overrides", default="", help="for ours, separated by spaces")
    parser.add_argument("--peer", choices=WAYS, help=argparse.SUPPRESS)
    args, train = parser.parse_known_args()
    if args.peer in ("trl", "trl_fast", "unsloth"):
        return measure_peer(args)
    if args.peer:
        return train_here(args.peer, train)
    args.out.mkdir(parents=True, exist_ok=True)
    data = (args.out / "pairs.jsonl").absolute()
    tokens = write_pairs(data, PAIRS * args.steps)
    found: dict[str, list[dict]] = {}
    for turn in range(args.rounds):
        names = args.only.split(",")
        for name in names if turn % 2 == 0 else names[::-1]:
            run = measure_ours(args, name, data, turn) if name.startswith("ours") else measure_process(args, name, turn)
            found.setdefault(name, []).append(run)
            print(f"{name:<14} {run.get('error') or line_of(run, args.warm_up)}", flush=True)
            (args.out / "preference_speed.json").write_text(json.dumps({"argv": sys.argv, "runs": found}), encoding="utf-8")
    print(table(found, args.warm_up, tokens))


def write_pairs(file: Path, count: int) -> tuple[int, int]:
    """Pairs of random words as lengths of preference data go; returns their words with the prompt twice, and once."""
    rng, twice, once = random.Random(0), 0, 0
    with open(file, "w", encoding="utf-8") as out:
        for _ in range(count):
            prompt, *answers = (
                [f"w{rng.randrange(8000)}" for _ in range(min(most, max(20, int(rng.lognormvariate(mean, 0.6)))))]
                for mean, most in ((4.8, 600), (5.1, 500), (5.1, 500))
            )
            twice, once = twice + 2 * len(prompt) + sum(map(len, answers)), once + len(prompt) + sum(map(len, answers))
            texts = [" " + " ".join(answer) for answer in answers]
            out.write(json.dumps({"prompt": " ".join(prompt), "chosen": texts[0], "rejected": texts[1]}) + "\n")
    return twice, once


def measure_ours(args: argparse.Namespace, name: str, data: Path, turn: int) -> dict:
    """One run; the times are those of its metrics.jsonl."""
    place = (args.out / f"{name}_{turn}").absolute()
    command = [
        *(sys.executable, __file__, "--model", "-", "--out", "-", "--peer", name),
        *("method=dpo", f"model.name={args.model}", "model.max_seq_length=2048", "dataset=local", f"dataset.path={data}"),
        *("dataset.template=plain", "dataset.eval_fraction=0", "lora.r=16", "lora.lora_alpha=16", "model.load_in_4bit=false"),
        *("trainer.gradient_checkpointing=false", f"trainer.per_device_train_batch_size={PAIRS}"),
        *("trainer.gradient_accumulation_steps=1", f"trainer.max_steps={args.steps}", f"trainer.save_steps={args.steps}"),
        *("trainer.torch_compile=true", "trainer.cuda_graphs=true", "trainer.logging_steps=1", "samples.num_held_out=0"),
        *("tracking=none", f"hydra.run.dir={place}", *args.overrides.split()),
    ]
    with open(f"{place}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        return {"error": Path(f"{place}.log").read_text(encoding="utf-8")[-1500:]}
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]
    record = json.loads((place / "run.json").read_text(encoding="utf-8"))
    checked = json.loads((place / "preflight.json").read_text(encoding="utf-8"))
    return {
        "seconds": [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(lines)],
        "losses": [line["loss"] for line in lines],
        "peak_gib": max(line["memory_gib"] for line in lines),
        "reference": record["seconds"].get("reference"),
        "memory": checked.get("memory"),
    }


def train_here(name: str, overrides: list[str]) -> None:
    """train.py with these overrides in this process; `ours_unshared` takes no model for one that can share prompts."""
    if name == "ours_unshared":
        from sft.methods import dpo

        dpo._difference = lambda *_: "the benchmark asks for it"
    sys.argv = [str(ROOT / "train.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


def measure_process(args: argparse.Namespace, name: str, turn: int) -> dict:
    """One run of a peer."""
    log = args.out / f"{name}_{turn}.log"
    command = [
        sys.executable,
        __file__,
        "--model",
        args.model,
        "--out",
        str(args.out),
        "--peer",
        name,
        "--steps",
        str(args.steps),
    ]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        return {"error": log.read_text(encoding="utf-8")[-1500:]}
    return json.loads((args.out / f"{name}.json").read_text(encoding="utf-8"))


def measure_peer(args: argparse.Namespace) -> None:
    """Train with a peer in this process and write what was measured."""
    from benchmarks import peer

    args.load_in_4bit = args.checkpointing = False
    if args.peer == "unsloth":
        from unsloth import PatchDPOTrainer

        PatchDPOTrainer()
    model, tokenizer = (peer.load_unsloth if args.peer == "unsloth" else peer.load_trl)(args)
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends, losses, gpu = [], [], torch.cuda.is_available()

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.time())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    fast = {"precompute_ref_log_probs": True, "use_liger_kernel": True} if args.peer == "trl_fast" else {}
    arguments = DPOConfig(
        output_dir=str(args.out / f"{args.peer}.run"), max_length=2048, per_device_train_batch_size=PAIRS,
        gradient_accumulation_steps=1, gradient_checkpointing=False, max_steps=args.steps, learning_rate=5e-6, bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1, save_strategy="no", report_to="none", optim="adamw_torch_fused", seed=3407, **fast,
    )  # fmt: skip
    rows = load_dataset("json", data_files=str(args.out / "pairs.jsonl"), split="train")
    began = time.time()
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Watch()])
    trainer.train()
    found = {"seconds": [b - a for a, b in itertools.pairwise(ends)], "losses": losses, "peak_gib": peer.peak_gib(),
             "to_first_step": ends[0] - began}  # fmt: skip
    (args.out / f"{args.peer}.json").write_text(json.dumps(found), encoding="utf-8")


def line_of(run: dict, warm_up: int) -> str:
    """One measurement in words."""
    seconds = sorted(run["seconds"][warm_up:])
    spread = f"{seconds[len(seconds) // 4]:.3f}-{seconds[3 * len(seconds) // 4]:.3f}"
    words = [f"{pairs_a_second(run, warm_up):.2f} pairs/s", f"{statistics.median(seconds):.3f} s/step ({spread})"]
    words += [f"{run['peak_gib']:.1f} GiB", f"first loss {run['losses'][0]:.4f}", f"last {run['losses'][-1]:.4f}"]
    more = {key: run[key] for key in ("reference", "memory", "to_first_step") if run.get(key)}
    return "   ".join([*words, str(more)])


def pairs_a_second(run: dict, warm_up: int) -> float:
    """Of all steps after the first `warm_up`."""
    seconds = run["seconds"][warm_up:]
    return PAIRS * len(seconds) / sum(seconds)


def table(found: dict[str, list[dict]], warm_up: int, tokens: tuple[int, int]) -> str:
    """The Markdown table, and the ratio of tokens that sharing the prompt saves."""
    good = {name: [run for run in runs if "error" not in run] for name, runs in found.items()}
    rates = {name: statistics.median(pairs_a_second(run, warm_up) for run in runs) for name, runs in good.items() if runs}
    out = ["| run | pairs/s | peak GiB | ours is faster by |", "|---|---:|---:|---:|"]
    for name, rate in rates.items():
        times = f"{rates['ours'] / rate:.2f}" if "ours" in rates else ""
        out.append(f"| {name} | {rate:.2f} | {good[name][0]['peak_gib']:.1f} | {times} |")
    return "\n".join(
        [*out, "", f"Tokens with the prompt twice and once: {tokens[0]} / {tokens[1]} = {tokens[0] / tokens[1]:.3f}"]
    )


if __name__ == "__main__":
    main()
