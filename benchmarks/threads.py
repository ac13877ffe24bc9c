"""Seconds of the demo's training steps on the CPU, quiet and beside busy processes, by how its threads wait.

    python benchmarks/threads.py                     3 runs of each, of 4 steps
    python benchmarks/threads.py --runs 5 --busy 4

`default` is libgomp's own 300,000 rounds, `ours` what train.py sets (sft/threads.py), `passive` OMP_WAIT_POLICY=passive. The
kinds take turns, so that a machine that slows down slows all of them. Prints the medians and every number.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"default": {"GOMP_SPINCOUNT": "300000"}, "ours": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--busy", type=int, default=2, help="processes that do nothing but count")
    args = parser.parse_args()
    for count in (0, args.busy):
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        with busy(count):
            for _ in range(args.runs):
                for kind in KINDS:
                    seconds[kind].append(train(kind, args.steps))
        print(f"beside {count} busy processes" if count else "quiet", flush=True)
        for kind, measured in seconds.items():
            print(f"  {kind:8} median {statistics.median(measured):6.1f} s   {measured}", flush=True)


def train(kind: str, steps: int) -> float:
    """Training seconds of a run of the shipped model and data, from its run.json."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        quick = (f"trainer.max_steps={steps}", "samples.num_held_out=0", "dataset.eval_fraction=0", "tracking=none")
        command = [sys.executable, str(ROOT / "train.py"), *quick, f"hydra.run.dir={folder}/run"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))["seconds"]["train"]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many cores busy inside the block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
