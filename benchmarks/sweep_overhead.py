"""What a sweep costs beyond its jobs: seconds and memory a job, in one process and in a process each.

    python benchmarks/sweep_overhead.py 30             30 jobs, with the memory after each
    python benchmarks/sweep_overhead.py 8 process      the same with sweep.isolation=process
    python benchmarks/sweep_overhead.py 200

The jobs are one training step each on tiny_random. Overhead is the whole command's time without the time that the jobs'
own run.json names, divided by their number; so it includes the start of the command.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
JOB = ("trainer=debug", "model=tiny_random", "dataset.max_rows=24", "samples.num_held_out=0", "tracking=none",
       "trainer.max_steps=1", "trainer.eval_steps=1", "trainer.save_steps=1")  # fmt: skip


def main(count: int, isolation: str) -> None:
    """Run the sweep, watch its memory from outside, and print what was measured."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, str(ROOT / "train.py"), "-m", *JOB, f"sweep.isolation={isolation}"]
        command += [f"seed=range(1,{count + 1})", "dataset.seed=1", "hydra.sweep.dir=sweep"]
        start = time.monotonic()
        with open(Path(place) / "log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=place, stderr=log, stdout=log)
            memory = watch(process, Path(place) / "sweep" / "sweep.json")
        wall = time.monotonic() - start
        if process.returncode:
            sys.exit((Path(place) / "log").read_text(encoding="utf-8")[-2000:])
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in Path(place).glob("sweep/*/run.json")]
    inside = sum(run["seconds"]["total"] for run in runs)
    print(f"{count} jobs, isolation={isolation}: {wall:.1f} s in all, {inside / count:.2f} s inside a job")
    print(f"overhead a job: {(wall - inside) / count:.2f} s")
    third, last = memory.get(3), memory.get(max(memory))
    if isolation == "shared" and third and count > 3:
        print(f"memory after 3 jobs {third:.0f} MiB, after {max(memory)} {last:.0f} MiB: {100 * (last / third - 1):+.1f} %")


def watch(process: subprocess.Popen, index: Path) -> dict[int, float]:
    """Resident memory in MiB of the process each time another job is finished."""
    seen: dict[int, float] = {}
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        if index.is_file():
            jobs = json.loads(index.read_text(encoding="utf-8"))["jobs"]
            done = sum(job["status"] == "finished" for job in jobs)
            try:
                seen.setdefault(done, watched.memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                break
        time.sleep(0.1)
    process.wait()
    return {done: rss for done, rss in seen.items() if done}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, sys.argv[2] if len(sys.argv) > 2 else "shared")
