"""The values of swept settings, and a grid of jobs from them; some may go together instead of in every combination."""

import itertools

from hydra.core.override_parser.types import Override

from sft.errors import Problem


def list_values(override: Override) -> list[str]:
    """The values of a swept setting; of an interval, which a search draws from, its two ends.

    Raises HydraException where they cannot be listed.
    """
    if override.is_interval_sweep():
        return [str(override.value().start), str(override.value().end)]
    return list(override.sweep_string_iterator())


def expand(overrides: list[Override], paired: list[str]) -> list[list[str]]:
    """The jobs of a sweep as lists of overrides: every combination, with the `paired` keys first with first.

    An override that stands twice counts as its last one, as in Hydra's own grid.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_sweep_override():
            values[override.get_key_element()] = [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()]
        else:
            values[override.get_key_element()] = [override.input_line]  # as it was typed
    together = [key for key in values if key in paired and len(values[key]) > 1]
    axes: list[list[tuple[str, ...]]] = []
    for key, choices in values.items():
        if key in together[1:]:
            continue
        axes.append(list(zip(*(values[k] for k in together), strict=True)) if key in together else [(c,) for c in choices])
    return [list(itertools.chain(*job)) for job in itertools.product(*axes)]


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
