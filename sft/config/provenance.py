"""Where the value of each setting comes from: the command line, a file under conf/, or the schema's default."""

from pathlib import Path
from typing import Any

import yaml

from sft.config.keys import leaf_keys
from sft.config.schema import GROUPS, Settings

DEFAULT, TYPED = "default", "command line"


def find_provenance(
    choices: dict[str, str], overrides: tuple[str, ...], folders: list[Path], primary: str = "config"
) -> dict[str, str]:
    """{dotted key: origin} of every setting.

    `choices` are the options taken of each group, `overrides` what was typed, `folders` those that Hydra searches, first
    come first served. Later in this order wins, as in conf/config.yaml: groups, config.yaml, experiment, sweep, command line.
    """
    last = ("experiment", "sweep")
    groups = [(group, option) for group, option in choices.items() if group not in last]
    files = [(f"{group}/{option}.yaml", f"{group}." if group in GROUPS else "") for group, option in groups]
    files += [("config.yaml", "")]
    files += [(f"{group}/{choices[group]}.yaml", "") for group in last if group in choices]
    files += [(f"{primary}.yaml", "")] if primary != "config" else []
    provenance = dict.fromkeys(leaf_keys(), DEFAULT)
    for name, prefix in files:
        folder = next((folder for folder in folders if (folder / name).is_file()), None)
        if folder:
            keys = _keys_of(yaml.safe_load((folder / name).read_text(encoding="utf-8")) or {}, prefix)
            _note(provenance, keys, f"{folder.name}/{name}")
    typed = [o.partition("=")[0].lstrip("+") for o in overrides]
    _note(provenance, [key for key in typed if key not in GROUPS], TYPED)
    return provenance


def provenance_of(hydra: Any) -> dict[str, str]:
    """`find_provenance` of what Hydra has composed, by `HydraConfig.get()`."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    return find_provenance(dict(hydra.runtime.choices), tuple(hydra.overrides.task), folders, hydra.job.config_name)


def describe(settings: Settings, provenance: dict[str, str]) -> dict[str, dict[str, Any]]:
    """{dotted key: {"value", "origin"}} of every setting."""
    from sft.storage.jsonio import jsonable

    found = {}
    for key in leaf_keys():
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = {"value": jsonable(value), "origin": provenance.get(key, DEFAULT)}
    return found


def _keys_of(tree: Any, prefix: str) -> list[str]:
    keys = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        name = f"{prefix}{key}"
        keys += _keys_of(value, f"{name}.") if isinstance(value, dict) and value else [name]
    return keys


def _note(provenance: dict[str, str], keys: list[str], origin: str) -> None:
    for key in keys:
        for known in provenance:
            if known == key or known.startswith(f"{key}.") or key.startswith(f"{known}."):
                provenance[known] = origin
