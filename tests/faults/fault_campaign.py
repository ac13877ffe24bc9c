"""Kill runs at random moments, go on, and compare with the run that was never cut.

    python tests/faults/fault_campaign.py kills=500 seed=1
    python tests/faults/fault_campaign.py mode=stop kills=100       SIGTERM; measures the seconds to a durable checkpoint

Each case is a tiny run in one of a few shapes (dropout, early stopping, full fine-tuning ...). It is started, killed, started
again with the same settings, and so on, until it is let through. Then every value in metrics.jsonl, every line of
samples.jsonl and rollouts.jsonl, the final metrics and the bytes of the weights have to be those of the unkilled run; what
the clock and the memory say is left out. The imports are paid for once: runs are forked from this process.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sft.export import child as export_child
from sft.report import page
from sft.threads import spin_briefly

spin_briefly()

MEASURED = {"tokens_per_second", "memory_gib", "memory_allocated_gib"}
BASE = ("model=tiny_random", "tracking=none", "samples.max_new_tokens=4", "samples.num_held_out=2", "samples.every_steps=3",
        "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=8",
        "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.learning_rate=1e-2", "lora.lora_dropout=0.2")  # fmt: skip
GRPO = ("method=grpo", "lora.lora_dropout=0.0", "method.max_completion_length=6", "method.num_generations=4",
        "method.reward_funcs=[regex]", "method.reward_weights=[1]", 'method.reward_options={regex: {pattern: "[a-m]$"}}',
        "trainer.logging_steps=3", "trainer.eval_steps=4", "trainer.effective_batch_size=null")  # fmt: skip
"""About half of what the model says by chance ends in these letters."""
SHAPES = {
    "plain": ("trainer.save_total_limit=1",),  # so that a save also removes the checkpoint before
    "epochs": ("trainer.max_steps=-1", "trainer.num_train_epochs=3"),  # 10 rows, 5 steps an epoch, an uneven last one
    "sparse": ("trainer.logging_steps=3", "trainer.save_steps=4", "trainer.save_total_limit=1"),
    "early": ("trainer.early_stopping_patience=1", "trainer.learning_rate=1e-9", "trainer.early_stopping_threshold=0.01"),
    "last": ("trainer.load_best_model_at_end=false", "trainer.save_steps=3", "trainer.lr_scheduler_type=cosine"),
    "full": ("lora=none", "lora.lora_dropout=0.0", "trainer.learning_rate=1e-3"),
    "between": ("trainer.eval_steps=3", "trainer.save_total_limit=1"),  # checkpoints between evaluations
    "open": ("trainer.eval_steps=null", "samples.every_steps=null"),
    "blind": ("dataset.eval_fraction=0", "trainer.save_steps=1"),
    "dpo": ("method=dpo", "lora.lora_dropout=0.0", "trainer.logging_steps=3", "trainer.eval_steps=4"),
    "dpo_full": ("method=dpo", "lora=none", "lora.lora_dropout=0.0", "trainer.learning_rate=1e-3"),
    "grpo": GRPO,
    "grpo_twice": (*GRPO, "method.num_iterations=2", "trainer.save_steps=1", "method.beta=0.1"),  # stops between two updates
    "grpo_full": (*GRPO, "lora=none", "trainer.learning_rate=1e-3"),
    "merged": ("trainer.max_steps=2", "export.formats=[adapter,merged_16bit]"),
    "export": ("trainer.max_steps=2", "export.formats=[adapter,merged_16bit,gguf]", "export.gguf.quantizations=[f16,q8_0]"),
}


def main(argv: list[str]) -> int:
    """Run the campaign that `argv` describes; the exit code is 1 if a run was lost or differs."""
    options = {"kills": "100", "seed": "0", "mode": "kill", "shapes": ",".join(SHAPES), "cuts": "4"}
    options |= dict(word.split("=", 1) for word in argv)
    chance = random.Random(int(options["seed"]))
    work = Path(tempfile.mkdtemp(prefix="fault-campaign-"))
    prepare(work)
    whole = {shape: unkilled(work, shape) for shape in options["shapes"].split(",")}
    kills, cases, failures, stops = 0, 0, [], []
    while kills < int(options["kills"]):
        shape = chance.choice(list(whole))
        folder = work / f"case-{cases}"
        cases += 1
        cuts = min(chance.randint(1, int(options["cuts"])), int(options["kills"]) - kills)
        done, problems = cut_run(folder, shape, cuts, whole[shape]["seconds"], chance, options["mode"], stops)
        kills += done
        problems += compare(whole[shape]["folder"], folder) if not problems else []
        if problems:
            failures.append((folder, problems))
            print(f"FAILED {shape} {folder}: {problems}", flush=True)
        else:
            shutil.rmtree(folder)
        print(f"{kills} kills, {cases} runs, {len(failures)} failures", flush=True)
    if stops:
        print(f"SIGTERM to exit: median {sorted(stops)[len(stops) // 2]:.2f} s, longest {max(stops):.2f} s of {len(stops)}")
    print(f"seed {options['seed']}: {kills} kills of {cases} runs, {len(failures)} lost or different")
    if not failures:
        shutil.rmtree(work)
    return 1 if failures else 0


def prepare(work: Path) -> None:
    """Import everything a run imports, and write the rows."""
    # A fork has none of the threads that OpenMP started before it, and would wait for them for ever: there are to be none.
    os.environ["OMP_NUM_THREADS"] = "1"
    from sft.config.compose import register
    from sft.environment import prepare_environment

    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", WANDB_MODE="offline")
    # tqdm's own lock is one semaphore for all forks: a process killed while it holds it would stop every later one.
    tqdm.tqdm.set_lock(threading.RLock())
    prepare_environment()
    register()
    import peft  # noqa: F401
    import trl  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    page.bundled_charts = lambda: ""  # two of a run's seven seconds, and the same each time
    export_child.subprocess = types.SimpleNamespace(Popen=ForkedExport, TimeoutExpired=subprocess.TimeoutExpired)

    write_rows(work)


class ForkedExport:
    """What run() starts as `python -m sft.export RUN`, forked instead, so that its imports are paid for once too."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.returncode: int | None = None
        self.child = os.fork()
        if not self.child:
            code = 99
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.closerange(3, 256)  # as Popen does: the lock of the run's folder is among them
            try:
                from sft.export.__main__ import main as export

                code = export(Path(command[-1]))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = wait(self.child, 0.002)
        return self.returncode

    def wait(self, timeout: float) -> None:
        """Until it ends, or raise TimeoutExpired."""
        if self.returncode is None:
            self.returncode = wait(self.child, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("export", timeout)

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.child, signal.SIGTERM)


def write_rows(work: Path) -> str:
    """Write a few short rows into `work`; the override that names them."""
    rows = [{"instruction": f"Say {i}", "output": "one two three"[: 3 + i % 9], "chosen": "one two three"[: 3 + i % 9],
             "rejected": "three two one"[: 2 + i % 7]} for i in range(12)]  # fmt: skip
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"dataset.path={work / 'rows.jsonl'}"


def settings_of(work: Path, shape: str):
    """Composed settings of a shape."""
    from hydra import compose, initialize_config_dir

    from sft.config.compose import to_settings

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [*BASE, f"dataset.path={work / 'rows.jsonl'}", "dataset=local", *SHAPES[shape]]
        return to_settings(compose("config", overrides=overrides))


def start(folder: Path, shape: str) -> int:
    """Run in a child process; its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from sft.lifecycle import run

        code = run(settings_of(folder.parent, shape), folder).exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int, seconds: float = 300) -> int | None:
    """Exit code of a child, negative for a signal; None if it still runs after `seconds`."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def unkilled(work: Path, shape: str) -> dict:
    """The run of a shape that is left alone, and how long it took."""
    for name in ("warm", "whole"):  # the first one pays for the caches
        folder, begin = work / f"{name}-{shape}", time.monotonic()
        code = wait(start(folder, shape))
        if code != 0:
            raise SystemExit(f"The unkilled run ended with {code}: {folder.with_suffix('.log')}")
    return {"folder": folder, "seconds": time.monotonic() - begin}


def cut_run(folder: Path, shape: str, cuts: int, seconds: float, chance: random.Random, mode: str, stops: list) -> tuple:
    """Start, cut `cuts` times at random moments, let it through: (cuts that hit a living run, problems)."""
    done = 0
    for _ in range(cuts):
        child = start(folder, shape)
        code = wait(child, chance.uniform(0, seconds))
        if code is None:
            os.kill(child, signal.SIGKILL if mode == "kill" else signal.SIGTERM)
            begin, code = time.monotonic(), wait(child)
            stops += [time.monotonic() - begin] if mode == "stop" else []
            done += 1
            # Before run() listens, and after it has returned, a SIGTERM kills: the comparison says whether that did harm.
            if mode == "stop" and code not in (130, 0, 99, -signal.SIGTERM):
                return done, [f"SIGTERM ended it with {code}"]
        elif code != 0:
            return done, [f"it ended with {code} by itself"]
        if code == 0:
            break
    else:
        code = wait(start(folder, shape))
    return done, [] if code == 0 else [f"the last go ended with {code}"]


def compare(whole: Path, other: Path) -> list[str]:
    """What differs between two finished runs."""
    problems = []
    for name in ("metrics.jsonl", "samples.jsonl", "margins.jsonl", "rollouts.jsonl", "eval_rows.jsonl"):
        ours, theirs = (stable_lines(folder / name) for folder in (whole, other))
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            problems.append(f"{name} differs from line {at + 1} on: {ours[at : at + 1]} {theirs[at : at + 1]}")
    ours, theirs = (json.loads((f / "run.json").read_text(encoding="utf-8")) for f in (whole, other))
    for key in ("status", "reason", "config_hash", "data", "model"):
        if ours[key] != theirs[key]:
            problems.append(f"run.json: {key} is {theirs[key]}, not {ours[key]}")
    numbers = [{k: v for k, v in r["metrics"].items() if k not in MEASURED} for r in (ours, theirs)]
    if numbers[0] != numbers[1]:
        problems.append(f"run.json: metrics are {numbers[1]}, not {numbers[0]}")
    if weights_hash(whole) != weights_hash(other):
        problems.append("the weights differ")
    if export_hashes(whole) != export_hashes(other):
        problems.append(f"the exports differ: {export_hashes(other)}, not {export_hashes(whole)}")
    if not (other / "report.html").is_file():
        problems.append("no report")
    found = [*other.iterdir(), *(other / "checkpoints").iterdir(), *(other / "export").rglob("*")]
    left = [str(p.relative_to(other)) for p in found if p.name[0] == "." and p.name not in (".hydra", ".gitattributes")]
    return problems + ([f"left behind: {left}"] if left else [])


def stable_lines(path: Path) -> list[dict]:
    """Lines of a run without what the clock and the memory say."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def weights_hash(folder: Path) -> str:
    """Hash of the final weights' bytes."""
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def export_hashes(folder: Path) -> dict[str, str]:
    """Hash of each exported file of weights or of a tokenizer, and the status of each artifact."""
    kinds = (".safetensors", ".gguf", "tokenizer.json", "config.json", "Modelfile")
    files = [p for p in sorted((folder / "export").rglob("*")) if p.name.endswith(kinds)]
    hashes = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in files}
    report = folder / "export" / "verify.json"
    artifacts = json.loads(report.read_text(encoding="utf-8"))["artifacts"] if report.is_file() else {}
    return hashes | {name: facts["status"] for name, facts in artifacts.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
