"""Finished runs by what the user typed: a run folder, a checkpoint in it, or something made of it."""

from pathlib import Path
from typing import Any

from sft.config.consent import check_consent
from sft.config.schema import Settings, Shape
from sft.errors import Problem, refuse
from sft.paths import expanded
from sft.storage.jsonio import read_json


def prompt_form(folder: Path) -> tuple[Shape, list[str]]:
    """The shape of a run's rows and the tokens that end its completions, from preflight.json. Raises Refusal without them."""
    preflight = read_json(folder / "preflight.json")
    shape, stops = preflight.get("shape"), preflight.get("stop_tokens")
    plain = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if shape not in [shape.value for shape in Shape] or not stops or not plain:
        why = "It does not say how the run's prompts are shaped, or which tokens end its completions."
        raise refuse(str(folder / "preflight.json"), why, "bring the file back as the run wrote it")
    return Shape(shape), stops


def settings_of(folder: Path, consent: bool = False, base: str | None = None) -> tuple[Settings, dict[str, Any]]:
    """The settings that a run was made with, and its record; `model.name` is the folder where the run had it, or `base`.

    Raises Refusal if its run.json holds none, or has code of a model run while the command line does not (`consent`).
    """
    from sft.config.compose import fill_settings

    record = read_json(folder / "run.json")
    if "settings" not in record:
        raise refuse(f"run={folder}", "Its run.json holds no settings: nothing was trained.", "run=outputs/<another run>")
    settings = fill_settings(record["settings"])
    check_consent(settings, f"run={folder}", consent)
    settings.model.name = base or _name_of_base(settings, record)
    return settings, record


def check_base(folder: Path, settings: Settings) -> list[Problem]:
    """Whether the model's folder is there, if it is one; `settings` are the run's as `settings_of` gives them."""
    name, record = expanded(settings.model.name), read_json(folder / "run.json")
    if not name.is_absolute() or name.is_dir():
        return []
    trained_on, began = record["settings"]["model"]["name"], record.get("working_folder")
    why = f"The model's folder is not there: {name}."
    if str(name) == _recorded_folder(record) and not expanded(trained_on).is_absolute():
        why = f"The folder {trained_on} was relative to {began}, and {name} is not there."
    return [Problem(f"run={folder}", why, "model.name=<the folder that it is in now>   beside it")]


def _recorded_folder(record: dict[str, Any]) -> str | None:
    """The folder that a run loaded its model from; None where it was no folder of the user's."""
    kind, _, place = str((record.get("model") or {}).get("source")).partition("local folder ")
    return place or None if not kind else None


def _name_of_base(settings: Settings, record: dict[str, Any]) -> str:
    """`model.name` to load from wherever one is: what was a folder is never looked for on the hub."""
    name, place = settings.model.name, _recorded_folder(record)
    if place is None:
        return name
    tried = [Path(place), Path(record.get("working_folder") or ".", expanded(name)), expanded(name)]
    return str(next((p.absolute() for p in tried if (p / "config.json").is_file()), place))
