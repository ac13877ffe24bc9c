"""Checkpoints: written whole, found again, pruned, and restored from.

Whatever has a state of its own is a component: it gives the state and takes it back, and nothing here knows what is in it.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sft.distributed import group
from sft.errors import SaveFailed, first_line, refuse
from sft.storage import atomic

log = logging.getLogger(__name__)

STATE = "run_state.json"

LINES = ("metrics.jsonl", "samples.jsonl", "margins.jsonl", "rollouts.jsonl", "eval_rows.jsonl")
"""Files of a run that grow by lines."""

FLAT = {
    "log": ("tokens", "loss_since_log", "last_log"),
    "clock": ("seconds", "logged"),
    "early_stopping": ("patience_counter",),
    "nonfinite_steps": ("bad_steps",),
    "oom_retry": ("rows_at_once",),
    "time_budget": ("needs",),
    "step_end": ("due", "save_due"),
    "recorder": ("final", "eval_step"),
}
"""Keys of run_state.json from before it had components, by the component that they belong to. They are still written, for the
scripts that read them; a component's further keys, and further components, stand under `components` alone."""


class Component(Protocol):
    """Part of a run whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON has it. Every rank calls it; that of rank 0 is written."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, perhaps in an earlier version."""


def gather_state(components: dict[str, Component]) -> dict[str, Any]:
    """The state of each component by its name, and the flat keys of FLAT."""
    states = {name: component.state_dict() for name, component in components.items()}
    flat = {key: states[name][key] for name, keys in FLAT.items() if name in states for key in keys}
    return {**flat, "components": states}


def load_components(checkpoint: Path, components: dict[str, Component]) -> None:
    """Give each component the state that the checkpoint has of it; one that it knows nothing of is left as it began."""
    kept = read_state(checkpoint)
    older = {name: {key: kept[key] for key in keys if key in kept} for name, keys in FLAT.items()}
    states = kept.get("components", older)
    for name, component in components.items():
        if name in states:
            component.load_state_dict(states[name])


def find_checkpoint(folder: Path, before: dict[str, Any] | None, facts: dict[str, Any]) -> Path | None:
    """The checkpoint that the run in `folder` goes on from; None where it begins. Clears away what a kill left behind.

    Raises Refusal if the rows, or the adapter that pairs are measured against, are others (`facts` of the preflight) than those
    the checkpoint was trained with.
    """
    atomic.remove_leftovers(folder, "adapter", "model", "run.json", "report.html")
    if before is None and steps_saved(folder):
        why = "It holds checkpoints and no run.json that says which run they belong to."
        raise refuse(f"hydra.run.dir={folder}", why, f"bring run.json back, or remove {folder}/checkpoints")
    checkpoint = find_last(folder)
    if checkpoint is None or before is None:
        return None
    if (before.get("data") or {}).get("hash") != facts["data_hash"]:
        why = f"The data is not what it was when {folder} was trained up to {checkpoint.name.replace('-', ' ')}."
        raise refuse(f"hydra.run.dir={folder}", why, "bring the data back as it was, or start a new run")
    known, start = (before.get("start_from") or {}).get("hash"), facts.get("start_from") or {}
    if known and start.get("hash", known) != known:
        why = f"The adapter that {folder} began with, the reference of its pairs, is another by now: {start['adapter']}."
        raise refuse(f"hydra.run.dir={folder}", why, "bring the adapter back as it was, or start a new run")
    return checkpoint


def restore_run(folder: Path, checkpoint: Path | None, components: dict[str, Component]) -> None:
    """Bring the run's lines and the components to where they were at the checkpoint, or the lines to nothing without one."""
    if group.is_first():
        cut_back(folder, read_state(checkpoint).get("bytes", {}) if checkpoint else {})
    if checkpoint:
        load_components(checkpoint, components)
        log.info("Resume from step %s", checkpoint.name.rpartition("-")[2])


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

    `state` is what `gather_state` gave, kept beside transformers' own files. The lines written so far reach the disk before
    the checkpoint that counts them does. Raises SaveFailed, whatever the library that wrote calls it.
    """
    try:
        with _writing(folder, step, state) as work:
            yield work
    except Exception as error:
        raise SaveFailed(f"the checkpoint of step {step} could not be written: {first_line(error)}") from error


@contextlib.contextmanager
def _writing(folder: Path, step: int, state: dict[str, Any]) -> Iterator[Path]:
    lines = {name: folder / name for name in LINES}
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
    """What `writing` was given, with `bytes`: how long the files of LINES were."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Cut the files of LINES to the length they had at the checkpoint: later lines are written again."""
    for name in LINES:
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
