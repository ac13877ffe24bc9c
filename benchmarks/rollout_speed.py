"""Rollouts and steps of method=grpo beside the peers: the same model, prompts and numbers, in turn on one GPU.

    python benchmarks/rollout_speed.py --model DIR --out DIR
    python benchmarks/rollout_speed.py --model DIR --out DIR --only rollouts --profile

`rollouts` draws 64 completions of 8 prompts by sft/generation/decoding.py, `generate` by transformers' own function. `ours`,
`trl` and `unsloth` train: 8 prompts of 128 tokens a step, 8 completions each, of 256 tokens; TRL's GRPOTrainer with `generate`,
and the same trainer after Unsloth's patches. LoRA r 16 on seven projections, bf16, no checkpointing. Every measurement is a
process of its own. A step is timed from the end of one to the end of the next, those after `--warm-up`. The model has random
weights: hardly a completion ends by itself, so that all have 256 tokens. Writes rollout_speed.json and prints a table.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WAYS = ("rollouts", "generate", "ours", "trl", "unsloth")
PROMPTS, COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 128, 256
REWARD = "def letters(completion, row):\n    return sum(map(ord, completion)) % 17 / 17\n"


def main() -> None:
    """Measure in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="of rollouts; the first one warms up")
    parser.add_argument("--fp8", action="store_true", help="the frozen layers of `rollouts` in FP8")
    parser.add_argument("--profile", action="store_true", help="of one rollout: the kernels that take longest")
    parser.add_argument("--overrides", default="", help="for ours, separated by spaces")
    parser.add_argument("--peer", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return {"rollouts": measure_rollouts, "generate": measure_rollouts}.get(args.peer, measure_peer)(args)
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out)
    found = {}
    for name in args.only.split(","):
        found[name] = measure_ours(args) if name == "ours" else measure_process(args, name)
        print(f"{name:<10} {line_of(found[name], args.warm_up)}", flush=True)
        (args.out / "rollout_speed.json").write_text(json.dumps({"argv": sys.argv, "runs": found}), encoding="utf-8")
    print(table(found, args.warm_up))


def write_prompts(folder: Path) -> None:
    """Prompts of random words, and a reward that differs between them."""
    rng = random.Random(0)
    rows = [{"prompt": " ".join(f"w{rng.randrange(8000)}" for _ in range(PROMPT_TOKENS))} for _ in range(256)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "letters.py").write_text(REWARD, encoding="utf-8")


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """One run of train.py; the times are those of its metrics.jsonl."""
    place = (args.out / "ours").absolute()
    command = [
        *(sys.executable, str(ROOT / "train.py"), "method=grpo", f"model.name={args.model}", "model.max_seq_length=1024"),
        *("dataset=local", f"dataset.path={(args.out / 'prompts.jsonl').absolute()}", "dataset.template=plain"),
        *("dataset.eval_fraction=0", "lora.r=16", "lora.lora_alpha=16", "model.load_in_4bit=false"),
        *("trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=2", f"trainer.max_steps={args.steps}"),
        *(f"trainer.effective_batch_size={PROMPTS}", f"method.num_generations={COMPLETIONS}", "trainer.logging_steps=1"),
        *(
            f"method.max_completion_length={NEW_TOKENS}",
            f"method.reward_funcs=[{(args.out / 'letters.py').absolute()}:letters]",
        ),
        *("method.reward_weights=[1]", f"trainer.save_steps={args.steps}", "samples.num_held_out=0", "tracking=none"),
        *(f"hydra.run.dir={place}", *args.overrides.split()),
    ]
    with open(f"{place}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        return {"error": Path(f"{place}.log").read_text(encoding="utf-8")[-2500:]}
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]
    record = json.loads((place / "run.json").read_text(encoding="utf-8"))
    return {
        "seconds": [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(lines)],
        "peak_gib": max(line["memory_gib"] for line in lines),
        "rollouts": record["seconds"]["rollouts"] / len(lines),
        "sampler_gap": statistics.median(line["sampler_gap"] for line in lines),
        "length": statistics.fmean(line["length"] for line in lines),
    }


def measure_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    log = args.out / f"{name}.log"
    words = [*sys.argv[1:], "--peer", name]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, __file__, *words], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        return {"error": log.read_text(encoding="utf-8")[-2500:]}
    return json.loads((args.out / f"{name}.json").read_text(encoding="utf-8"))


def measure_rollouts(args: argparse.Namespace) -> None:
    """Draw completions again and again, by our decoder or by `generate`."""
    import torch
    from peft import get_peft_model

    from benchmarks import peer
    from sft.generation import batching
    from sft.generation.decoding import Decoder
    from sft.generation.drawing import Drawing, key_of
    from sft.model.structure import base_of

    args.load_in_4bit = args.checkpointing = False
    model, tokenizer = peer.load_trl(args)
    if args.fp8:
        from sft.model import fp8

        config, base = model.peft_config["default"], model.unload()
        fp8.round_layers(base)  # before there is an adapter, as in a run: layers with one input then lie side by side
        model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)  # an adapter that is trained
    model.eval()
    rows = [json.loads(line)["prompt"] for line in (args.out / "prompts.jsonl").read_text().splitlines()[:PROMPTS]]
    prompts = [tokenizer(row)["input_ids"][:PROMPT_TOKENS] for row in rows]
    keys = [[key_of(0, p, i) for i in range(COMPLETIONS)] for p in range(PROMPTS)]
    decoder = Decoder(base_of(model), PROMPTS * COMPLETIONS, PROMPT_TOKENS + NEW_TOKENS, trained=True)
    seconds = []

    def draw() -> int:
        if args.peer == "rollouts":
            found = decoder.complete(prompts, {tokenizer.eos_token_id}, NEW_TOKENS, lambda: None, Drawing(1.0, keys))
            return sum(len(one.ids) for some in found for one in some)
        ids, mask = batching.padded([prompt for prompt in prompts for _ in range(COMPLETIONS)], 0, model.device)
        found = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS,
                               min_new_tokens=NEW_TOKENS, pad_token_id=0)  # fmt: skip
        return found[:, ids.shape[1] :].numel()

    with torch.no_grad():
        for _ in range(args.rounds):
            torch.cuda.synchronize()
            began = time.time()
            tokens = draw()
            torch.cuda.synchronize()
            seconds.append(time.time() - began)
        if args.profile and args.peer == "rollouts":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                draw()
            print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=90))
    found = {"seconds": seconds, "tokens": tokens, "peak_gib": peer.peak_gib()}
    (args.out / f"{args.peer}.json").write_text(json.dumps(found), encoding="utf-8")


def measure_peer(args: argparse.Namespace) -> None:
    """Train with a peer in this process and write what was measured."""
    from benchmarks import peer

    args.load_in_4bit = args.checkpointing = False
    model, tokenizer = (peer.load_unsloth if args.peer == "unsloth" else peer.load_trl)(args)
    import runpy

    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            ends.append(time.time())

    letters = runpy.run_path(str(args.out / "letters.py"))["letters"]
    arguments = GRPOConfig(
        output_dir=str(args.out / f"{args.peer}.run"), per_device_train_batch_size=COMPLETIONS,
        gradient_accumulation_steps=PROMPTS, num_generations=COMPLETIONS, max_completion_length=NEW_TOKENS,
        gradient_checkpointing=False, max_steps=args.steps, learning_rate=5e-6, bf16=True, logging_steps=1,
        save_strategy="no", report_to="none", optim="adamw_torch_fused", seed=3407,
    )  # fmt: skip
    rows = load_dataset("json", data_files=str(args.out / "prompts.jsonl"), split="train")
    trainer = GRPOTrainer(model, reward_funcs=lambda completions, **_: [letters(one, {}) for one in completions],
                          args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Watch()])  # fmt: skip
    trainer.train()
    lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line]
    found = {"seconds": [b - a for a, b in itertools.pairwise(ends)], "peak_gib": peer.peak_gib(),
             "length": statistics.fmean(lengths)}  # fmt: skip
    (args.out / f"{args.peer}.json").write_text(json.dumps(found), encoding="utf-8")


def line_of(run: dict[str, Any], warm_up: int) -> str:
    """One measurement in words."""
    if "error" in run:
        return run["error"]
    more = {key: round(run[key], 5) for key in ("peak_gib", "rollouts", "sampler_gap", "length") if key in run}
    if "tokens" in run:
        return f"{tokens_a_second(run):,.0f} tokens/s   rounds {[round(s, 3) for s in run['seconds']]}   {more}"
    steps = run["seconds"][warm_up - 1 :]
    return f"{statistics.median(steps):.3f} s a step   {[round(s, 3) for s in run['seconds']]}   {more}"


def tokens_a_second(run: dict[str, Any]) -> float:
    """Of all rounds but the first."""
    return run["tokens"] / statistics.median(run["seconds"][1:])


def table(found: dict[str, dict[str, Any]], warm_up: int) -> str:
    """The Markdown table."""
    good = {name: run for name, run in found.items() if "error" not in run}
    rates = {name: tokens_a_second(run) for name, run in good.items() if "tokens" in run}
    steps = {name: statistics.median(run["seconds"][warm_up - 1 :]) for name, run in good.items() if "tokens" not in run}
    out = ["| | tokens/s | s a step | peak GiB | ours is faster by |", "|---|---:|---:|---:|---:|"]
    for name, run in good.items():
        ours = rates["rollouts"] / rates[name] if name in rates and "rollouts" in rates else None
        ours = steps[name] / steps["ours"] if name in steps and "ours" in steps else ours
        cells = [f"{rates[name]:,.0f}" if name in rates else "", f"{steps[name]:.2f}" if name in steps else ""]
        out.append(f"| {name} | {' | '.join(cells)} | {run['peak_gib']:.1f} | {f'{ours:.2f}' if ours else ''} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
