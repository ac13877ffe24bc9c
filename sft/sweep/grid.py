"""The values of swept settings, a grid of jobs from them, and the config of each job.

Some settings may go together instead of in every combination.
"""

import itertools
import pickle
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, Quote, QuotedString, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from sft.config.keys import find_field, plain_type
from sft.errors import Problem


def list_values(override: Override) -> list[str]:
    """The values of a swept setting; of an interval, which a search draws from, its two ends.

    Raises HydraException where they cannot be listed.
    """
    if override.is_interval_sweep():
        return [str(override.value().start), str(override.value().end)]
    return [_typed(value) for value in override.sweep_iterator()]


def _typed(value: Any) -> str:
    """A value as it is typed after `key=`; Hydra hands the texts of `choice("a = b")` on without their quotes."""
    line = Transformer.str(value)
    if not isinstance(value, str):
        return line
    try:
        same = OverridesParser.create().parse_override(f"key={line}").value() == value
    except HydraException:
        same = False
    return line if same else QuotedString(value, Quote.double).with_quotes()


def quoted_choices(overrides: list[Override]) -> dict[str, str]:
    """{`key=a text`: `key="a text"`} of the texts to choose from: a search hands them to its jobs without quotes."""
    quoted = {}
    for override in overrides:
        choices, key = override.value().list if isinstance(override.value(), ChoiceSweep) else [], override.get_key_element()
        quoted |= {f"{key}={value}": f"{key}={_typed(value)}" for value in choices if isinstance(value, str)}
        quoted |= {f"{key}={value.text}": f"{key}={_typed(value)}" for value in choices if isinstance(value, QuotedString)}
    return quoted


def expand(overrides: list[Override], paired: list[str]) -> list[list[str]]:
    """The jobs of a sweep as lists of overrides: every combination, with the `paired` keys first with first.

    An override that stands twice counts as its last one, as in Hydra's own grid.
    """
    return [list(itertools.chain(*job)) for job in itertools.product(*_axes(overrides, paired))]


def each_value_once(overrides: list[Override], paired: list[str]) -> list[list[str]]:
    """The first job of a sweep, and one more for each further value of each axis of its grid; one alone without a sweep."""
    axes = _axes(overrides, paired)
    first = [values[0] for values in axes]
    jobs = [first, *([*first[:i], value, *first[i + 1 :]] for i, values in enumerate(axes) for value in values[1:])]
    return [list(itertools.chain(*job)) for job in jobs]


def _axes(overrides: list[Override], paired: list[str]) -> list[list[tuple[str, ...]]]:
    """The values of each axis of the grid as overrides; those of `paired` keys are one axis."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, line = override.get_key_element(), [override.input_line]  # as it was typed
        values[key] = [f"{key}={v}" for v in list_values(override)] or line if override.is_sweep_override() else line
    together = [key for key in values if key in paired and len(values[key]) > 1]
    axes: list[list[tuple[str, ...]]] = []
    for key, choices in values.items():
        if key in together[1:]:
            continue
        axes.append(list(zip(*(values[k] for k in together), strict=True)) if key in together else [(c,) for c in choices])
    return axes


def compose_job(make: Callable[[list[str]], DictConfig], overrides: list[str], composed: dict[tuple, bytes]) -> DictConfig:
    """One job's config, as `make(overrides)` composes it.

    Hydra takes a fifth of a second, for two hundred jobs the better part of a minute. Jobs that differ in plain values alone
    are set on a copy of the first of them, kept in `composed`; whatever changes which files are read is composed anew.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [override for override in parsed if _is_plain(override)]
    kind = tuple(override.key_or_group if override in values else override.input_line for override in parsed)
    if kind not in composed:
        composed[kind] = pickle.dumps(make(overrides))
        return pickle.loads(composed[kind])
    job = pickle.loads(composed[kind])
    for override in values:
        OmegaConf.update(job, override.key_or_group, override.value(), merge=True)
    named = [override for override in parsed if not override.is_hydra_override()]
    job.hydra.overrides.task = [override.input_line for override in named]
    style = job.hydra.job.config.override_dirname
    job.hydra.job.override_dirname = get_overrides_dirname(named, style.exclude_keys, style.item_sep, style.kv_sep)
    return job


def _is_plain(override: Override) -> bool:
    """Whether it sets one value or a list of a setting: not a group, a table, or what Hydra itself goes by."""
    if override.type != OverrideType.CHANGE or override.package is not None or isinstance(override.value(), dict):
        return False
    cls, name = find_field(override.key_or_group)
    kind = plain_type(cls, name) if cls else dict
    return not (is_dataclass(kind) or "dict" in str(kind))


def check_pairs(paired: list[str], counts: dict[str, int]) -> list[Problem]:
    """Problems of `sweep.paired`: a key that is not swept, or lists of different lengths. `counts`: values by swept key."""
    shown = f"sweep.paired=[{','.join(paired)}]"
    missing = [key for key in paired if key not in counts]
    if missing:
        fix = f"python train.py -m {missing[0]}=a,b ...   or leave it out of sweep.paired"
        return [Problem(shown, f"{' and '.join(missing)} has no list of values in this sweep.", fix)]
    if len({counts[key] for key in paired}) > 1:
        listed = ", ".join(f"{key} has {counts[key]}" for key in paired)
        return [Problem(shown, f"Paired settings need as many values each: {listed}.", "write one value of each for every job")]
    return []
