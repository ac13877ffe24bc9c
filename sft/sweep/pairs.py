"""Swept values that go together instead of in every combination."""

from sft.errors import Problem


def pair_up(batch: list[list[str]], paired: list[str]) -> list[list[str]]:
    """The jobs of a grid in which the `paired` keys stand at the same place of their lists: first with first."""
    values: dict[str, list[str]] = {key: [] for key in paired}
    for overrides in batch:
        for key, value in (override.partition("=")[::2] for override in overrides):
            if key in values and value not in values[key]:
                values[key].append(value)
    places = [
        {values[key].index(value) for key, value in (o.partition("=")[::2] for o in overrides) if key in values}
        for overrides in batch
    ]
    return [overrides for overrides, place in zip(batch, places, strict=True) if len(place) <= 1]


def check_pairs(paired: list[str], counts: dict[str, int]) -> list[Problem]:
    """Problems of `sweep.paired`: a key that is not swept, or lists of different lengths. `counts`: values by swept key."""
    shown = f"sweep.paired=[{','.join(paired)}]"
    missing = [key for key in paired if key not in counts]
    if missing:
        fix = f"python train.py -m {missing[0]}=a,b ...   or leave it out of sweep.paired"
        return [Problem(shown, f"{' and '.join(missing)} has no list of values in this sweep.", fix)]
    if len({counts[key] for key in paired}) > 1:
        told = ", ".join(f"{key} has {counts[key]}" for key in paired)
        return [Problem(shown, f"Paired settings need as many values each: {told}.", "write one value of each for every job")]
    return []
