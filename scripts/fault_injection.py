"""Fail or kill every system call of one checkpoint save, and look for the last good checkpoint.

    python scripts/fault_injection.py                 every call; needs strace
    python scripts/fault_injection.py every=10        each tenth of a kind, the first and the last among them
    python scripts/fault_injection.py resume=5        goes on with each fifth folder to its end and compares

A tiny run is stopped in front of its second checkpoint. From there processes are forked, each with a copy of the run folder;
strace makes one call of the save fail (ENOSPC, EIO) or kills the process in it. Afterwards the last good checkpoint has to be
the first one, unharmed, or the second one, whole; and the second one where the save said that it went well.
"""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.fault_campaign import compare, prepare, start, unkilled, wait  # noqa: E402

FAULTS = {
    "write": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "pwrite64": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "writev": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "ftruncate": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "fsync": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "rename": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "mkdir": ("signal=SIGKILL", "error=ENOSPC", "error=EIO"),
    "unlinkat": ("signal=SIGKILL", "error=EIO"),
    "rmdir": ("signal=SIGKILL", "error=EIO"),
}
STEP = 4


def main(argv: list[str]) -> int:
    """Run the injections that `argv` describes; the exit code is 1 if a checkpoint was lost or is not whole."""
    options = {"every": "1", "resume": "25"} | dict(word.split("=", 1) for word in argv)
    if not shutil.which("strace"):
        raise SystemExit("strace is needed: apt-get install strace")
    work = Path(tempfile.mkdtemp(prefix="fault-injection-"))
    prepare(work)
    whole = unkilled(work, "plain")["folder"]
    report = work / "report.json"
    child = os.fork()
    if not child:
        run_with_injections(work, report, int(options["every"]))
    wait(child, 3600)
    cases = json.loads(report.read_text(encoding="utf-8"))
    failures = [case for case in cases if case["problem"]]
    gone_on = 0
    for case in cases[:: int(options["resume"])]:
        folder = Path(case["folder"])
        code = wait(start(folder, "plain"))
        problems = [f"it ended with {code}"] if code else compare(whole, folder)
        gone_on += 1
        if problems:
            failures.append({**case, "problem": problems})
    for failure in failures:
        print("FAILED", failure)
    kinds = collections.Counter(f"{case['call']} {case['fault']}" for case in cases)
    for kind, number in kinds.items():
        print(f"{number:5d}  {kind}")
    print(f"{len(cases)} faults in one save, {gone_on} runs gone on with, {len(failures)} failures")
    if not failures:
        shutil.rmtree(work)
    return 1 if failures else 0


def run_with_injections(work: Path, report: Path, every: int) -> None:
    """Train up to the second save, try every fault on it from there, and end this process."""
    try:
        from scripts.fault_campaign import settings_of
        from sft import trainer as training
        from sft.run import run

        build = training.build_trainer

        def build_and_hook(*args):
            trainer = build(*args)
            save = trainer._save_checkpoint

            def hooked(model, trial):
                if trainer.state.global_step == STEP:
                    report.write_text(json.dumps(try_all(trainer, save, work, every)), encoding="utf-8")
                    os._exit(0)
                save(model, trial)

            trainer._save_checkpoint = hooked
            return trainer

        training.build_trainer = build_and_hook
        run(settings_of(work, "plain"), work / "base")
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def try_all(trainer, save, work: Path, every: int) -> list[dict]:
    """One case a fault: what was done, the folder it was done to, and what is wrong with it, if anything."""
    counts = count_calls(trainer, save, work)
    print({call: number for call, number in counts.items() if call in FAULTS}, flush=True)
    cases = []
    for call, faults in FAULTS.items():
        numbers = sorted({*range(1, counts[call] + 1, every), *([counts[call]] if counts[call] else [])})
        for number in numbers:
            for fault in faults:
                folder = work / f"fault-{len(cases)}"
                code = save_under_strace(trainer, save, folder, ["-e", f"inject={call}:{fault}:when={number}"])
                case = {"call": call, "fault": fault, "number": number, "code": code, "folder": str(folder)}
                cases.append({**case, "problem": judge(folder, code)})
    return cases


def count_calls(trainer, save, work: Path) -> collections.Counter:
    """How often the save makes each call when nothing fails."""
    log = work / "calls.txt"
    code = save_under_strace(trainer, save, work / "counted", ["-o", str(log)])
    assert code == 0, code
    return collections.Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(errors="replace"), re.MULTILINE))


def save_under_strace(trainer, save, folder: Path, options: list[str]) -> int:
    """Exit code of a process that saves into a copy of the run folder under strace; negative for a signal."""
    shutil.copytree(trainer.loop.folder, folder)
    child = os.fork()
    if not child:
        code = 1
        try:
            trainer.loop.folder = folder
            os.kill(os.getpid(), signal.SIGSTOP)
            save(trainer.model, None)
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    calls = ",".join(FAULTS)
    command = ["strace", "-f", "-e", f"trace={calls}", *options, "-p", str(child)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "attached" not in tracer.stderr.readline():
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    tracer.stderr.read()
    code = wait(child)
    tracer.wait()
    return code


def judge(folder: Path, code: int) -> str | None:
    """What is wrong after a save that ended with `code`, or None. Does not clean the folder up."""
    from sft import checkpoints, durable

    whole = [s for s in checkpoints.steps_saved(folder) if durable.find_damage(checkpoints.place_of(folder, s)) is None]
    if checkpoints.steps_saved(folder) != whole:
        return f"damaged checkpoints: {checkpoints.steps_saved(folder)}, whole: {whole}"
    if code == 0 and STEP not in whole:
        return "the save went well, and its checkpoint is not there"
    return None if whole else "no checkpoint is left"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
