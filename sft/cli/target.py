"""Which run a command means: a folder, the last one, or the best of a sweep."""

import difflib
import shlex
from pathlib import Path

from sft.errors import refuse
from sft.paths import expanded


def find_run(text: str) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None) of `run=<text>`: `best` is the best run of the newest sweep, a sweep's folder its best.

    Raises Refusal, with the runs there are, if it names none.
    """
    place = expanded(text)
    if text == "best" or (place / "sweep.json").is_file():
        from sft.sweep.leaderboard import best_run

        return best_run(None if text == "best" else place), None
    if (place / "run.json").is_file():
        return place, None
    if (place / "adapter_config.json").is_file() or (place / "config.json").is_file():
        owner = next((p for p in place.resolve().parents if (p / "run.json").is_file()), None)
        if owner is not None:
            return owner, None if place.name in ("adapter", "model") else place.resolve()
        raise refuse(f"run={text}", "It belongs to no run: there is no run.json above it.", "run=outputs/<run>")
    near = place.parent if place.parent.is_dir() else Path("outputs")
    runs = sorted(p.parent.name for p in near.glob("*/run.json"))
    close = difflib.get_close_matches(place.name, runs, 1, 0.3) or runs[-1:]
    why = "It is no run: there is no run.json in it." if place.is_dir() else "There is no such folder."
    raise refuse(f"run={text}", why, shlex.quote(f"run={near / close[0]}") if close else "run=outputs/<run>")
