"""Golden runs: what today's code writes, held against what an earlier commit wrote on the same machine.

    python tests/golden.py record golden.json      at the commit that is known to be right
    python tests/golden.py compare golden.json     at the one that must not change anything; exit 1 where it does

Five commands are run on `model=tiny_random`: a plain run, one that is killed and resumed, a sweep of four, an export of all
formats and a run of two processes. Compared are the lines of metrics.jsonl, samples.jsonl, preflight.json and run.json
without clock, memory and place, and the hashes of all weights. Numbers are compared to the last digit, so that a record is of
use only on the machine that wrote it.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ("model=tiny_random", "trainer=debug", "tracking=none", "dataset.max_rows=40", "samples.num_held_out=2",
        "samples.max_new_tokens=8", "trainer.max_steps=6", "trainer.save_steps=2", "trainer.eval_steps=3")  # fmt: skip
CLOCK = re.compile(r"(_at|seconds?|_gib|memory|_s|_bytes|speed|git_commit|host|pid|folder|command)$|^(timings?|time|at)$")
PLACES = {"versions", "hardware", "machine", "environment", "python", "platform", "destinations_mark", "cpu", "libraries"}
FREE = re.compile(r"[\d.]+( GiB)? free")
HASHED = (".safetensors", ".gguf", "tokenizer.json", "Modelfile")


def without_clock(value: Any, folder: str) -> Any:
    """`value` without what no two runs have in common, and with the folder of the golden runs left out of every text."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not CLOCK.search(k) and k not in PLACES}
        return {k: without_clock(v, folder) for k, v in sorted(kept.items())}
    if isinstance(value, list):
        return [without_clock(v, folder) for v in value]
    return FREE.sub("free", value.replace(folder, "...")) if isinstance(value, str) else value


def facts_of(run: Path, folder: Path) -> dict[str, Any]:
    """Everything of one run folder that the same code writes again."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and "wandb" not in p.parts and ".hydra" not in p.parts):
        name = str(path.relative_to(run))
        if path.name in ("metrics.jsonl", "samples.jsonl", "held_out.jsonl"):
            found[name] = [
                without_clock(json.loads(line), str(folder)) for line in path.read_text(encoding="utf-8").splitlines()
            ]
        elif path.name in ("run.json", "preflight.json", "verify.json", "sweep.json", "adapter_config.json"):
            found[name] = without_clock(json.loads(path.read_text(encoding="utf-8")), str(folder))
        elif path.name.endswith(HASHED):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "there"
    return found


def golden(folder: Path) -> dict[str, Any]:
    """Run the five commands in `folder` (empty, or with runs of before to be compared again): the facts of each run."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0",  # the order of names in adapter_config.json
        "SFT_CACHE": str(folder / "cache"),
    }

    def train(*words: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], cwd=folder, env=environment)

    def done(process: subprocess.Popen) -> None:
        if process.wait(600):
            raise SystemExit(f"a golden run ended with exit code {process.returncode}")

    done(train(*BASE, "hydra.run.dir=plain"))
    cut = train(*BASE, "hydra.run.dir=resumed")
    while not (folder / "resumed/checkpoints/checkpoint-2/manifest.json").exists() and cut.poll() is None:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    done(train("resume=resumed"))
    done(train("-m", *BASE, "lora.r=4,8", "trainer.learning_rate=1e-3,2e-3", "hydra.sweep.dir=sweep"))
    done(train(*BASE, "export=all", "hydra.run.dir=exported"))
    done(
        train(
            *BASE,
            "lora.lora_dropout=0",
            "distributed.num_processes=2",
            "trainer.effective_batch_size=2",
            "trainer.gradient_accumulation_steps=null",
            "hydra.run.dir=two",
        )
    )
    found = {name: facts_of(folder / name, folder) for name in ("plain", "resumed", "exported", "two", "sweep")}
    for session in found["resumed"]["run.json"]["sessions"]:
        session.pop("from", None)  # where the kill came
    return found


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """One line for each leaf that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [d for k in sorted(before.keys() | now.keys())
                for d in differences(before.get(k, "(absent)"), now.get(k, "(absent)"), f"{place}/{k}")]  # fmt: skip
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [d for i, (b, n) in enumerate(zip(before, now, strict=True)) for d in differences(b, n, f"{place}[{i}]")]
    return [] if before == now else [f"{place}: {str(before)[:200]} -> {str(now)[:200]}"]


def main() -> int:
    """`record FILE` or `compare FILE`; exit 1 where a run differs from the record."""
    word, file = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        found = golden(Path(folder))
    if word == "record":
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"recorded: {sum(len(run) for run in found.values())} files of {len(found)} runs")
        return 0
    apart = differences(json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(found)))
    print("\n".join(apart) or "the golden runs are equal")
    return bool(apart)


if __name__ == "__main__":
    sys.exit(main())
