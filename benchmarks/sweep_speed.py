"""Eight jobs of a sweep, command to last adapter, beside eight processes of a peer.

    python benchmarks/sweep_speed.py --model DIR --data rows.json --out DIR --peers DIR/speed.json

The sweep is `python train.py -m lora.r=8,16 trainer.learning_rate=...` over four learning rates, `--steps` steps of 8 rows each
with an evaluation before and after. A peer's eight processes are eight times the "saved" seconds of one, which `speed.py`
measured with as many steps on the same machine: they share nothing, and none of them evaluates.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the sweep and print its seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--peers", type=Path, help="speed.json of speed.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--overrides", default="", help="separated by spaces")
    args = parser.parse_args()
    command = [
        *(
            sys.executable,
            str(ROOT / "train.py"),
            "-m",
            f"model.name={args.model}",
            "model.max_seq_length=2048",
            "dataset=local",
        ),
        *(
            f"dataset.path={args.data.absolute()}",
            "dataset.template=alpaca",
            "dataset.loss_on=all",
            "dataset.eval_fraction=0.05",
        ),
        *("lora.r=8,16", "trainer.learning_rate=5e-5,1e-4,2e-4,4e-4", f"trainer.max_steps={args.steps}", "seed=3407"),
        *("trainer.per_device_train_batch_size=8", "trainer.effective_batch_size=8", f"trainer.eval_steps={args.steps}"),
        *(f"trainer.save_steps={args.steps}", "samples.num_held_out=0", "tracking=none", f"hydra.sweep.dir={args.out}"),
        *args.overrides.split(),
    ]
    began = time.time()
    subprocess.run(command, check=True)
    seconds = time.time() - began
    records = [json.loads(path.read_text(encoding="utf-8")) for path in args.out.glob("*/run.json")]
    assert len(records) == 8 and all(record["status"] == "finished" for record in records)
    print(f"sweep of 8 jobs of {args.steps} steps: {seconds:.0f} s")
    for record in records:
        print("  ", record["name"], record["seconds"])
    for rank in (8, 16):  # the learning rate is 0 at the first step: whatever a job takes over from another one shows here
        lines = [path.read_text(encoding="utf-8").splitlines() for path in args.out.glob(f"*r={rank}_*/metrics.jsonl")]
        first = [next(line for line in map(json.loads, one) if "loss" in line) for one in lines]
        norms = [line["grad_norm"] for line in first]
        print(f"rank {rank}: first losses {[line['loss'] for line in first]}, gradient norms {norms}")
        assert max(norms) < 1.01 * min(norms), "jobs of the same rank, seed and rows begin unlike each other"
    if args.peers:
        for name, runs in json.loads(args.peers.read_text(encoding="utf-8"))["results"].items():
            whole = [r["saved"] for r in runs if "error" not in r and len(r["seconds"]) == args.steps - 1]
            if whole and not name.startswith("ours"):
                each = statistics.median(whole)
                print(f"{name}: 8 x {each:.1f} s = {8 * each:.0f} s, {8 * each / seconds:.1f} times the sweep")


if __name__ == "__main__":
    main()
