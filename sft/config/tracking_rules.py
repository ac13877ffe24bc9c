"""Which trackers a run has, and rules for their settings: names that they refuse, packages they need, what they ignore."""

import difflib
import importlib.util
import re
from dataclasses import fields

from sft.config.keys import shown
from sft.config.schema import Settings, TrackerName, TrackingMode, TrackingSettings
from sft.errors import Problem

NAME_LENGTH, TAG_LENGTH = 128, 64  # what W&B takes

TAKES = {
    "wandb": {"mode", "project", "entity", "name", "tags", "group", "notes", "alert", "log_adapter"},
    "tensorboard": {"tags", "notes"},
    "mlflow": {"mode", "project", "name", "tags", "group", "notes"},
    "swanlab": {"mode", "project", "entity", "name", "tags", "group", "notes"},
    "trackio": {"project", "name", "tags", "group", "notes", "alert"},
}
"""Which settings a tracker has a use for."""


def trackers_of(tracking: TrackingSettings) -> list[str]:
    """The trackers of a run by name: those of `tracking.trackers`, else the one that was chosen, if any."""
    names = tracking.trackers or [tracking.tracker.value]
    return [name for name in dict.fromkeys(names) if name != TrackerName.none.value]


def check_tracking(settings: Settings) -> list[Problem]:
    """Trackers that there are not, and what one of them would refuse after loading."""
    if problems := _check_list(settings.tracking):
        return problems
    checks = {"wandb": _check_wandb, "swanlab": _check_swanlab}
    return [problem for name in trackers_of(settings.tracking) if name in checks for problem in checks[name](settings)]


def check_packages(settings: Settings) -> list[Problem]:
    """Trackers whose package is not installed."""
    wanted, name = settings.tracking.trackers, settings.tracking.tracker.value
    what = f"tracking.trackers=[{','.join(wanted)}]" if wanted else f"tracking={name}"
    extra = [name for name in trackers_of(settings.tracking) if name in TAKES and name != "wandb"]
    why, fix = "The package {0} is not installed.", 'pip install -e ".[{0}]"'
    return [Problem(what, why.format(name), fix.format(name)) for name in extra if not _is_installed(name)]


def warn_of_tracking(tracking: TrackingSettings) -> list[str]:
    """Settings that no tracker of the run takes."""
    names, found = trackers_of(tracking), []
    if tracking.trackers and tracking.tracker.value not in (*names, TrackerName.wandb.value):
        found.append(f"tracking={tracking.tracker.value} is ignored: tracking.trackers={shown(tracking.trackers)}.")
    taken = set().union(*(TAKES.get(name, set()) for name in names)) if names else TAKES["wandb"] - {"alert", "log_adapter"}
    defaults = TrackingSettings()
    free = [f.name for f in fields(tracking) if f.name not in ("tracker", "trackers", *taken)]
    ignored = [key for key in free if getattr(tracking, key) not in (getattr(defaults, key), TrackingMode.offline)]
    if ignored:
        wanted = " and ".join(f"tracking.{key}={shown(getattr(tracking, key))}" for key in ignored)
        why = f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no use for it" if names else "tracking=none"
        found.append(f"{wanted} is ignored: {why}.")
    return found


def _is_installed(package: str) -> bool:
    """Whether the package can be imported; a folder of its name, such as wandb/, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _check_list(tracking: TrackingSettings) -> list[Problem]:
    known, wanted = [name.value for name in TrackerName if name != TrackerName.none], tracking.trackers
    what, problems = f"tracking.trackers=[{','.join(map(str, wanted))}]", []
    for name in wanted:
        if name == TrackerName.none.value:
            problems.append(Problem(what, "none is not a tracker.", "tracking=none   without tracking.trackers"))
        elif name not in known:
            close = difflib.get_close_matches(str(name), known, 1, 0.4)
            fixed = [close[0] if other == name and close else other for other in wanted]
            fix = f"'tracking.trackers=[{','.join(fixed)}]'" if close else "'tracking.trackers=[wandb,tensorboard]'"
            problems.append(Problem(what, f"There is no tracker {name}. There are: {', '.join(known)}.", fix))
    return problems


def _check_wandb(settings: Settings) -> list[Problem]:
    """Names that W&B would refuse after loading, and an adapter to send where there is none."""
    tracking, problems, refused = settings.tracking, [], r"/\#?%:"
    names = {"project": "A W&B project", "entity": "A W&B user or team", "name": "A W&B run", "group": "A W&B group"}
    for key, thing in names.items():
        text, bad = getattr(tracking, key), refused if key in ("project", "entity") else ""
        if text is None or (0 < len(text) <= NAME_LENGTH and not set(text) & set(bad)):
            continue
        rule = f"1 to {NAME_LENGTH} characters" + (f", none of them {' '.join(bad)}" if bad else "")
        team, slash, rest = text.partition("/")
        two = (
            slash
            and key in ("project", "entity")
            and all(re.fullmatch(r"[a-zA-Z0-9_.-]{1,128}", part) for part in (team, rest))
        )
        fix = f"tracking.entity={team} tracking.project={rest}" if two else f"tracking.{key}={_clean(text, NAME_LENGTH)}"
        problems.append(Problem(f"tracking.{key}={text}", f"{thing}'s name has {rule}.", fix))
    if any(not 0 < len(tag) <= TAG_LENGTH for tag in tracking.tags):
        tags = ",".join(dict.fromkeys(_clean(tag, TAG_LENGTH) for tag in tracking.tags if tag))
        why = f"A W&B tag has 1 to {TAG_LENGTH} characters."
        problems.append(Problem(f"tracking.tags=[{','.join(tracking.tags)}]", why, f"'tracking.tags=[{tags}]'"))
    if tracking.log_adapter and not settings.lora.enabled:
        why = "All weights are trained, so that there is no adapter, and whole models are not sent to W&B."
        problems.append(Problem("tracking.log_adapter=true lora=none", why, "tracking.log_adapter=false"))
    return problems


def _check_swanlab(settings: Settings) -> list[Problem]:
    """Names that SwanLab would refuse after loading."""
    problems = []
    for key, thing, length, more in (("project", "project", 100, "_.+-"), ("entity", "workspace", 25, "_-")):
        text = getattr(settings.tracking, key)
        if text is not None and not re.fullmatch(rf"[0-9a-zA-Z{more}]{{1,{length}}}", text):
            why = f"A SwanLab {thing}'s name has 1 to {length} characters: letters a to z, digits, {' '.join(more)}."
            fix = _clean(text.replace(".", "-") if key == "entity" else text, length)
            problems.append(Problem(f"tracking.{key}={text}", why, f"tracking.{key}={fix}"))
    return problems


def _clean(text: str, length: int) -> str:
    """The text as a name that W&B and the command line take as it stands."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", text)[:length].strip("-") or "sft"
