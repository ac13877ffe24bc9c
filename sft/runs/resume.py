"""Whether a run folder can be resumed, by whom, and with which settings. Imports nothing heavy.

run.json is what counts: a folder with one is a run, and its `config_hash` says whether the settings given are its own.
A status of `running` says nothing about now, because a killed run cannot change it; who works in a folder holds its lock.
"""

import contextlib
import json
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.config.batching import BatchPlan
from sft.config.consent import check_consent
from sft.config.fingerprint import AROUND, config_hash, reward_hashes
from sft.config.keys import flatten
from sft.config.keys import typed as as_typed
from sft.config.lora_rules import other_settings
from sft.config.schema import Settings
from sft.errors import Problem, Refusal, refuse
from sft.storage.forms import fitted
from sft.storage.jsonio import jsonable, parse_object

log = logging.getLogger(__name__)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The contents of a folder's run.json; None where there is none, or none that can be read."""
    path = folder / "run.json"
    try:
        record = parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if record is None else fitted(record, path)


@contextlib.contextmanager
def locked(folder: Path, taken: Problem | None = None, seconds: float = 0) -> Iterator[None]:
    """Hold a folder's lock inside the block. The system lets go of it when the process ends, however it ends.

    Raises Refusal with `taken` if another process holds it for `seconds` more; at once for a run folder.
    """
    import fcntl

    descriptor, limit = os.open(folder, os.O_RDONLY), time.monotonic() + seconds  # run.json is another file after each writing
    try:
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= limit:
                        raise Refusal([taken or _taken(folder)]) from None
                    time.sleep(0.1)
        except OSError as error:  # some network file systems
            log.warning("%s cannot be locked (%s): start no second run in it.", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def check_folder(folder: Path, settings: Settings, locked: bool = False) -> list[Problem]:
    """Why `settings` cannot be trained into `folder`: it holds another run, a finished one, or one that is at work.

    `locked` says that the caller holds the folder's lock itself.
    """
    record = read_record(folder)
    if record is None:
        return []
    other = as_typed("hydra.run.dir", f"{str(folder).rstrip('/')}_2")
    fix = f"{other}\nleave hydra.run.dir out   for a new folder under outputs/"
    what = f"hydra.run.dir={folder}"
    if record.get("status") == "finished":
        return [Problem(what, f"The folder {folder} holds a run already, and it is finished.", fix)]
    known = record.get("config_hash")
    if known != config_hash(settings) and (known or record.get("status") != "failed"):  # without a hash nothing had begun
        others = _differences(record, settings) if known else "its run.json names none"
        if others:  # else another version of this project wrote the hash, over the same settings
            why = f"The folder {folder} holds a run already, and its settings are others: {others}."
            if record.get("settings") is not None:
                fix = f"{shlex.quote(f'resume={folder}')}   resumes that run with its own settings\n{fix}"
            return [Problem(what, why, fix)]
        if locked:  # the run begins, at work where it began
            _warn_of_rewards(record, settings)
    return [] if locked else _check_lock(folder)


def recorded_run(folder: Path, consent: bool = False, processes: str | None = None) -> tuple[Settings, dict[str, Any]]:
    """Settings and record of the run in `folder`, to go on with them.

    Raises Refusal if there is nothing to go on with, or the run needs code of its model that the command line does not allow
    (`consent`). `processes` is another `distributed.num_processes` than before, as typed. Under torchrun it has no say.
    """
    from sft.config.compose import fill_settings

    what = f"resume={folder}"
    record = read_record(folder)
    if not folder.is_dir():
        raise refuse(what, "There is no such folder.", f"looked for {folder.resolve()}")
    if record is None and (folder / "multirun.yaml").is_file():
        raise refuse(what, "This is the folder of a sweep.", f"name one of its runs: resume={folder}/<run>")
    if record is None or record.get("settings") is None:
        near = next((p for p in (folder.parent, folder.parent.parent) if (p / "run.json").is_file()), None)
        begin = "name a folder with a run.json in it, or start the run again: nothing was trained"
        fix = shlex.quote(f"resume={near}") if near else begin
        raise refuse(what, "It holds no run.json with the settings of a run.", fix)
    if record.get("status") == "finished":
        raise refuse(what, "This run is finished.", further(folder, record))
    problems = _check_lock(folder)
    if problems:
        raise Refusal(problems)
    settings = fill_settings(record["settings"])
    check_consent(settings, what, consent)
    if record.get("config_hash") != config_hash(settings) and not record.get("reward_files"):
        log.warning("The settings of %s were written by another version of this project.", folder)
    if processes is not None:
        settings.distributed.num_processes = int(processes) if processes.isdigit() else processes
    elif "RANK" in os.environ:
        settings.distributed.num_processes = 1
    return settings, record


def further(folder: Path, record: dict[str, Any], typed: Sequence[str] = ()) -> str:
    """The command that trains the weights of a finished run further: a new run with the words of the first one, and `typed`."""
    words = [w for w in record.get("overrides") or [] if not w.startswith(("hydra.", "lora.start_from=", "export"))]
    names = {w.partition("=")[0] for w in typed}
    words = [*(w for w in words if w.partition("=")[0] not in names), *typed]
    if (folder / "adapter").is_dir():
        words = [w for w in words if not w.startswith("lora.extra.init_lora_weights=")] + _as_saved(folder, record)
        words += shlex.split(as_typed("lora.start_from", os.path.relpath(folder)))
    elif (folder / "model").is_dir():
        words = [
            *(w for w in words if not w.startswith(("model=", "model.name="))),
            *shlex.split(as_typed("model.name", f"{os.path.relpath(folder)}/model")),
        ]
    else:
        return "python train.py ...   starts a new one"
    return f"python train.py {shlex.join(words)}   trains its weights further, in a new run"


def _as_saved(folder: Path, record: dict[str, Any]) -> list[str]:
    """Settings of a run's adapter as it was saved that are others than those it was made with: PiSSA's has twice the rank."""
    from sft.config.compose import fill_settings

    try:
        other = other_settings(folder / "adapter", fill_settings(record["settings"]).lora)
    except (KeyError, ValueError, Refusal):
        return []
    return [f"lora.{key}={there}" for key, (there, _) in other.items() if key in ("r", "lora_alpha")]


def working_folder(record: dict[str, Any], folder: Path) -> contextlib.AbstractContextManager[Any]:
    """Work where the run in `folder` was started, if that is here: relative paths in its settings are looked up there.

    The run folder itself is no such place: what a run reads would come with the record that names it.
    """
    place = record.get("working_folder")
    if not place:
        return contextlib.nullcontext()
    if not isinstance(place, str) or not os.path.isabs(place) or Path(place).resolve().is_relative_to(folder.resolve()):
        log.warning("run.json names %r as the run's working folder, which is not believed: paths are looked up here.", place)
        return contextlib.nullcontext()
    return contextlib.chdir(place) if os.path.isdir(place) else contextlib.nullcontext()


def read_batch_plan(before: dict[str, Any] | None) -> BatchPlan | None:
    """The run's batch plan of before; None where its record does not have it."""
    kept = (before or {}).get("split") or {}
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps")
    names = (*counts, "gradient_checkpointing", "every_n_layers")
    good = all((kept.get(name) or 0) > 0 for name in counts) and (kept.get("every_n_layers", 1) or 0) > 0
    return (
        BatchPlan(**{"gradient_checkpointing": None, **{name: kept[name] for name in names if name in kept}}) if good else None
    )


def _check_lock(folder: Path) -> list[Problem]:
    try:
        with locked(folder):
            return []
    except Refusal as refusal:
        return refusal.problems


def _taken(folder: Path) -> Problem:
    fix = "wait until it ends, or stop it with Ctrl-C\nleave hydra.run.dir out   for a new folder under outputs/"
    return Problem(f"hydra.run.dir={folder}", "Another process is training in this folder.", fix)


def _warn_of_rewards(record: dict[str, Any], settings: Settings) -> None:
    """Warn of rewards of the user's own whose file is another than when the run began."""
    began, now = record.get("reward_files") or {}, reward_hashes(settings)
    for name in [name for name in now if began.get(name) != now[name]]:
        log.warning("The file of the reward %s has changed since the run began: the steps to come are rewarded by it.", name)


def _differences(record: dict[str, Any], settings: Settings) -> str:
    """The settings that differ, as `lora.r is 8 there and 16 here`; at most three are named.

    A setting that the record does not know is younger than it: there it was what is now the default.
    """
    there, here, defaults = (flatten(tree) for tree in (record.get("settings") or {}, jsonable(settings), jsonable(Settings())))
    keys = [k for k in here if k.partition(".")[0] not in AROUND and there.get(k, defaults.get(k)) != here[k]]
    changed = [
        f"{key} is {json.dumps(there.get(key, defaults.get(key)))} there and {json.dumps(here[key])} here" for key in keys[:3]
    ]
    return ", ".join(changed) + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")
