"""Fail or kill every system call of one checkpoint save or one export, and look at what is left.

    python tests/faults/fault_injection.py                 every call of a save; needs strace
    python tests/faults/fault_injection.py every=10        each tenth of a kind, the first and the last among them
    python tests/faults/fault_injection.py resume=5        goes on with each fifth folder to its end and compares
    python tests/faults/fault_injection.py what=export every=20 resume=5

A tiny run is stopped in front of its second checkpoint, or of its exports. From there processes are forked, each with a copy
of the run folder; strace makes one call fail (ENOSPC, EIO) or kills the process in it, in each program that the export starts
as well. Afterwards the last good checkpoint has to be the first one, unharmed, or the second one, whole; and the second one
where the save said that it went well. Of the exports each file has to be whole or absent, and none may be missing where the
export said that it went well; made again, they are those of the run that nothing happened to.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults.fault_campaign import compare, prepare, start, unkilled, wait

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
    options = {"every": "1", "resume": "25", "what": "save"} | dict(word.split("=", 1) for word in argv)
    what, shape = options["what"], {"save": "plain", "export": "export"}[options["what"]]
    if not shutil.which("strace"):
        raise SystemExit("strace is needed: apt-get install strace")
    work = Path(tempfile.mkdtemp(prefix="fault-injection-"))
    prepare(work)
    whole = unkilled(work, shape)["folder"]
    report = work / "report.json"
    child = os.fork()
    if not child:
        (run_to_the_save if what == "save" else run_to_the_export)(work, report, int(options["every"]))
    wait(child, 36000)
    cases = json.loads(report.read_text(encoding="utf-8"))
    failures = [case for case in cases if case["problem"]]
    gone_on = 0
    for case in cases[:: int(options["resume"])]:
        folder = Path(case["folder"])
        code = wait(start(folder, shape))
        problems = [f"it ended with {code}"] if code else compare(whole, folder)
        gone_on += 1
        if problems:
            failures.append({**case, "problem": problems})
    for failure in failures:
        print("FAILED", failure)
    kinds = collections.Counter(f"{case['call']} {case['fault']}" for case in cases)
    for kind, number in kinds.items():
        print(f"{number:5d}  {kind}")
    print(f"{len(cases)} faults in one {what}, {gone_on} runs gone on with, {len(failures)} failures")
    if not failures:
        shutil.rmtree(work)
    return 1 if failures else 0


def run_to_the_save(work: Path, report: Path, every: int) -> None:
    """Train up to the second save, try every fault on it from there, and end this process."""
    try:
        from sft.lifecycle import run
        from sft.methods import sft
        from tests.faults.fault_campaign import settings_of

        build = sft.build_trainer

        def build_and_hook(*args):
            trainer = build(*args)
            save = trainer._save_checkpoint

            def hooked(model, trial):
                if trainer.state.global_step == STEP:

                    def action(folder):
                        trainer.loop.folder = folder
                        save(trainer.model, None)

                    cases = try_all(trainer.loop.folder, action, judge_save, work, every)
                    report.write_text(json.dumps(cases), encoding="utf-8")
                    os._exit(0)
                save(model, trial)

            trainer._save_checkpoint = hooked
            return trainer

        sft.build_trainer = build_and_hook
        run(settings_of(work, "plain"), work / "base")
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def run_to_the_export(work: Path, report: Path, every: int) -> None:
    """Train to the end, try every fault on the exports from there, and end this process."""
    try:
        from sft import lifecycle as sft_run
        from sft.export.__main__ import main as export
        from tests.faults.fault_campaign import export_hashes, settings_of

        whole = export_hashes(work / "whole-export")

        def export_and_try(folder, record, stop):
            shutil.copytree(folder, work / "trained")

            def action(copy):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os._exit(export(copy))

            cases = try_all(work / "trained", action, lambda place, code: judge_export(place, code, whole), work, every)
            report.write_text(json.dumps(cases), encoding="utf-8")
            os._exit(0)

        sft_run.export_run_apart = export_and_try
        sft_run.run(settings_of(work, "export"), work / "base")
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def try_all(base: Path, action, judge, work: Path, every: int) -> list[dict]:
    """One case a fault: what was done, the copy of `base` it was done to, and what is wrong with that, if anything."""
    counts = count_calls(base, action, work)
    print({call: number for call, number in counts.items() if call in FAULTS}, flush=True)
    cases = []
    for call, faults in FAULTS.items():
        numbers = sorted({*range(1, counts[call] + 1, every), *([counts[call]] if counts[call] else [])})
        for number in numbers:
            for fault in faults:
                folder = work / f"fault-{len(cases)}"
                code = act_under_strace(base, action, folder, ["-e", f"inject={call}:{fault}:when={number}"])
                case = {"call": call, "fault": fault, "number": number, "code": code, "folder": str(folder)}
                cases.append({**case, "problem": judge(folder, code)})
    return cases


def count_calls(base: Path, action, work: Path) -> collections.Counter:
    """How often each call is made when nothing fails; strace counts in each process by itself, so the most of one."""
    log = work / "calls.txt"
    code = act_under_strace(base, action, work / "counted", ["-o", str(log)])
    assert code == 0, code
    most: collections.Counter = collections.Counter()
    made = re.findall(r"^(\d+) +(\w+)\(", log.read_text(errors="replace"), re.MULTILINE)
    for (_, call), number in collections.Counter(made).items():
        most[call] = max(most[call], number)
    return most


def act_under_strace(base: Path, action, folder: Path, options: list[str]) -> int:
    """Exit code of a process that does `action(folder)` to a copy of `base` under strace; negative for a signal."""
    shutil.copytree(base, folder)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            action(folder)
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    calls = ",".join(FAULTS)
    command = ["strace", "-f", "-e", f"trace={calls}", *options, "-p", str(child)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    while "attached" not in tracer.stderr.readline():
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    tracer.stderr.read()
    code = wait(child)
    tracer.wait()
    return code


def judge_save(folder: Path, code: int) -> str | None:
    """What is wrong after a save that ended with `code`, or None. Does not clean the folder up."""
    from sft.storage import atomic
    from sft.training import checkpoint

    whole = [s for s in checkpoint.steps_saved(folder) if atomic.find_damage(checkpoint.place_of(folder, s)) is None]
    if checkpoint.steps_saved(folder) != whole:
        return f"damaged checkpoints: {checkpoint.steps_saved(folder)}, whole: {whole}"
    if code == 0 and STEP not in whole:
        return "the save went well, and its checkpoint is not there"
    return None if whole else "no checkpoint is left"


def judge_export(folder: Path, code: int, whole: dict[str, str]) -> str | None:
    """What is wrong with the exports after one that ended with `code`, or None."""
    from tests.faults.fault_campaign import export_hashes

    try:
        found = export_hashes(folder)
    except ValueError:
        return "verify.json is no JSON"
    statuses = {name: value for name, value in found.items() if value in ("ok", "failed", "error")}
    files = {name: value for name, value in found.items() if name not in statuses and "/." not in name}
    other = [name for name, value in files.items() if whole.get(name) != value]
    if other:
        return f"not whole: {other}"
    if code == 0 and (files | statuses) != whole:
        return f"the export went well, and there is {files | statuses}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
