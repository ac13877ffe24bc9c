"""What a run is called: its folder, its name and its tags."""

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sft.config.provenance import DEFAULT, provenance_of


def options_by_group(choices: Mapping[str, Any]) -> dict[str, str]:
    """What was chosen of each group of ours, without `none`."""
    return {
        group: option for group, option in choices.items() if not group.startswith("hydra") and option not in (None, "none")
    }


def names_by_group(choices: Mapping[str, Any], provenance: Mapping[str, str], name: Any, path: Any) -> dict[str, str]:
    """What was chosen of each group, and for the model and the data what took the option's place.

    That is the last part of `model.name` and the file's name of `dataset.path`, where something else than the option's own
    file has set it: the command line, an experiment.
    """
    found = options_by_group(choices)
    for group, key, word in (
        ("model", "model.name", _last_part(name, r"\w[\w.-]*")),
        ("dataset", "dataset.path", _last_part(path, r"[\w-]+")),
    ):
        origin = provenance.get(key, DEFAULT)
        if word and origin != DEFAULT and not origin.endswith(f"/{group}/{found.get(group)}.yaml"):
            found[group] = word
    return found


def _last_part(path: Any, form: str) -> str | None:
    found = re.match(form, os.path.basename(path.rstrip("/"))) if isinstance(path, str) else None
    return found[0][:40] if found else None


def run_name(names: Mapping[str, str], overrides: tuple[str, ...]) -> str:
    """The name of one run: the model, the data, and what was typed of its training."""
    typed = [
        override.split(".", 1)[1] for override in overrides if override.startswith(("lora.", "trainer.")) and "=" in override
    ]
    return "_".join([*_first_words(names), *typed])[:100]


def job_name(names: Mapping[str, str], label: str) -> str:
    """The name of a sweep's job: the model, the data and what varies, as `job_label` made it for the folder."""
    return "_".join([*_first_words(names), label])[:100]


def tags_of(names: Mapping[str, str]) -> tuple[str, ...]:
    """What a run is found by: its names, but for the tracker's and `default`, which tell nothing apart."""
    return tuple(dict.fromkeys(name for group, name in names.items() if group != "tracking" and name != "default"))


def run_words(*, _root_: DictConfig) -> str:
    """`${run_words:}`: how the folder of the run ends that Hydra begins. `--cfg hydra` has no settings: the options then."""
    hydra = HydraConfig.get()
    values = (OmegaConf.select(_root_, key) for key in ("model.name", "dataset.path"))
    return "_".join(_first_words(names_by_group(hydra.runtime.choices, provenance_of(hydra), *values)))


def job_label(overrides: list[str]) -> str:
    """`${job_label:${hydra:overrides.task}}`: what varies in a sweep's job, as short `key=value` words for its folder.

    No slashes or commas, at most 60 characters.
    """
    swept = {a.partition("=")[0].lstrip("+") for a in sys.argv if re.search(r"=.*[,(]", a)}
    words = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in swept or not swept:
            words.append(f"{key.rsplit('.', 1)[-1]}={value}")
    return re.sub(r"[^\w.=+-]+", "-", "_".join(words)).strip("-")[:60] or "job"


def _first_words(names: Mapping[str, str]) -> list[str]:
    return [names[group].replace("/", "-") for group in ("model", "dataset") if group in names]
