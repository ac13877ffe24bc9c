"""Checkpoints: written whole, found again, pruned, and restored from."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.errors import SaveFailed, first_line, refuse
from sft.storage import atomic
from sft.storage.jsonio import read_lines


def find_checkpoint(folder: Path, before: dict[str, Any] | None, data_hash: str) -> Path | None:
    """The checkpoint that the run in `folder` goes on from; None where it begins. Clears away what a kill left behind.

    Raises Refusal if the rows are others than those the checkpoint was trained on.
    """
    atomic.remove_leftovers(folder, "adapter", "model", "run.json", "report.html")
    if before is None and steps_saved(folder):
        why = "It holds checkpoints and no run.json that says which run they belong to."
        raise refuse(f"hydra.run.dir={folder}", why, f"bring run.json back, or remove {folder}/checkpoints")
    checkpoint = find_last(folder)
    if checkpoint is None or before is None:
        return None
    if (before.get("data") or {}).get("hash") != data_hash:
        why = f"The data is not what it was when {folder} was trained up to {checkpoint.name.replace('-', ' ')}."
        raise refuse(f"hydra.run.dir={folder}", why, "bring the data back as it was, or start a new run")
    return checkpoint


def take_up(folder: Path, checkpoint: Path | None, recorder: Any) -> None:
    """Bring the run's lines and final numbers to where they were at the checkpoint, or to nothing without one."""
    kept = read_state(checkpoint) if checkpoint else {}
    if recorder.writes:
        cut_back(folder, kept.get("bytes", {}))
    if kept:
        recorder.restore(kept)
    if kept and recorder.writes:
        answers = [line for line in read_lines(folder / "samples.jsonl") if {"index", "completion"} <= line.keys()]
        recorder.tracking.remember(answers)
        log.info("Resume from step %s", checkpoint.name.rpartition("-")[2])


log = logging.getLogger(__name__)

STATE = "run_state.json"


def place_of(folder: Path, step: int) -> Path:
    """Where the run in `folder` has its checkpoint of `step`."""
    return folder / "checkpoints" / f"checkpoint-{step}"


def steps_saved(folder: Path) -> list[int]:
    """Steps of all checkpoints of a run, good or damaged, in order."""
    found = [re.fullmatch(r"checkpoint-(\d+)", p.name) for p in (folder / "checkpoints").glob("checkpoint-*")]
    return sorted(int(match.group(1)) for match in found if match)


@contextlib.contextmanager
def writing(folder: Path, step: int, state: dict[str, Any]) -> Iterator[Path]:
    """Write a checkpoint into the folder this gives; it counts from the moment the block ends well.

    `state` is what this project keeps beside transformers' own files. The lines written so far reach the disk before the
    checkpoint that counts them does. Raises SaveFailed, whatever the library that wrote calls it.
    """
    try:
        with _writing(folder, step, state) as work:
            yield work
    except Exception as error:
        raise SaveFailed(f"the checkpoint of step {step} could not be written: {first_line(error)}") from error


@contextlib.contextmanager
def _writing(folder: Path, step: int, state: dict[str, Any]) -> Iterator[Path]:
    lines = {name: folder / name for name in ("metrics.jsonl", "samples.jsonl")}
    for path in lines.values():
        atomic.sync_file(path)
    sizes = {name: path.stat().st_size if path.is_file() else 0 for name, path in lines.items()}
    with atomic.new_folder(place_of(folder, step)) as work:
        yield work
        (work / STATE).write_text(json.dumps({**state, "bytes": sizes}), encoding="utf-8")


def prune(folder: Path, limit: int, best: int | None) -> None:
    """Remove the oldest checkpoints until `limit` are left; the newest and that of the step `best` always stay."""
    steps = steps_saved(folder)
    spare = [step for step in steps[:-1] if step != best]
    for step in spare[: max(0, len(steps) - limit)]:
        atomic.remove_folder(place_of(folder, step))


def find_last(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None if there is none. Damaged ones and the remains of a kill are removed."""
    atomic.remove_leftovers(folder / "checkpoints", "checkpoint-*")
    for step in reversed(steps_saved(folder)):
        place = place_of(folder, step)
        damage = atomic.find_damage(place)
        if damage is None:
            return place
        log.warning("The checkpoint of step %d is damaged (%s); going back to the one before.", step, damage)
        atomic.remove_folder(place)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `writing` was given, with `bytes`: how long metrics.jsonl and samples.jsonl were."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Cut metrics.jsonl and samples.jsonl to the length they had at the checkpoint: later lines are written again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        path, size = folder / name, sizes.get(name, 0)
        atomic.drop_link(path)
        if not path.is_file():
            if size:
                log.warning("%s is gone; it begins anew where the run goes on.", name)
        elif not size:
            path.unlink()
        elif path.stat().st_size < size:
            log.warning("%s is shorter than it was at the checkpoint; its lines before are missing.", name)
        else:
            with open(path, "r+b") as file:
                file.truncate(size)
