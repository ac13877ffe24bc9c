"""How long `preflight.mode=only` takes on many rows, with nothing tokenised yet and with the tokens in the cache.

    python benchmarks/preflight_speed.py ruozhiba_qa.json
    python benchmarks/preflight_speed.py my_rows.json --rows 200000

Makes `--rows` rows (50,000) from those of a JSON file with `instruction` and `output`, by repetition with another number in
each question, and runs the command on them three times in processes of their own: once with an empty cache of tokens, twice
with a full one. Peak memory is that of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Make the rows, run the command, print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=int, default=50_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_rows(args.source, folder / "rows.jsonl", args.rows)
        size = (folder / "rows.jsonl").stat().st_size / 2**20
        print(f"{args.rows:,} rows, {size:.1f} MiB; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        cache = folder / "cache"
        measure(folder, cache, rows=8)  # makes the tokenizer, which no later run does
        for name in ("cold", "warm", "warm"):
            seconds, cpu, peak = measure(folder, cache)
            print(f"{name}  {seconds:6.1f} s  ({cpu:.1f} s of processor time), peak {peak:.2f} GiB")


def make_rows(source: Path, target: Path, count: int) -> None:
    """Write `count` rows: those of `source` again and again, each with its number behind the question."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    with open(target, "w", encoding="utf-8") as file:
        for i in range(count):
            row = rows[i % len(rows)]
            line = {"instruction": f"{row['instruction']} ({i // len(rows)})", "output": row["output"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def measure(folder: Path, cache: Path, rows: int | None = None) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak GiB) of one `preflight.mode=only`."""
    command = [sys.executable, str(ROOT / "train.py"), "preflight.mode=only", "dataset=local", "dataset.path=rows.jsonl",
               "tracking=none", *([f"dataset.max_rows={rows}"] if rows else [])]  # fmt: skip
    environment = {**os.environ, "SFT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    process = psutil.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(output[-3000:])
    usage = resource_of_children()
    return seconds, usage[0], usage[1]


def resource_of_children() -> tuple[float, float]:
    """(processor seconds since the last call, largest peak in GiB) of the processes that have ended."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = usage.ru_utime + usage.ru_stime
    spent, resource_of_children.before = total - getattr(resource_of_children, "before", 0.0), total
    return spent, usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    main()
