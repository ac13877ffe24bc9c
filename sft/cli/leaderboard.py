"""Print the table of a sweep, ranked by held-out loss or reward, with what has to be known before one row is called better.

    python scripts/leaderboard.py                                  the newest sweep in outputs/sweeps
    python scripts/leaderboard.py run=outputs/sweeps/<stamp>       another one
    python scripts/leaderboard.py run=outputs/sweeps/<stamp> --best    only the best run's folder, for scripts
    python scripts/leaderboard.py --json                           the table as one JSON object

leaderboard.csv and report.html in the sweep's folder are written anew from what its run folders say now.
"""

import os
import sys
from pathlib import Path

from sft import console
from sft.errors import Refusal, refuse
from sft.paths import expanded
from sft.programs import as_called
from sft.sweep import leaderboard, publish
from sft.sweep.index import find_sweeps, readable_index


@console.takes_json
def main(argv: list[str]) -> int:
    """Print the table that `argv` asks for; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0
    try:
        words = [word for word in argv if word != "--best"]
        stray = [word for word in words if not word.startswith("run=")]
        if stray:
            raise refuse(stray[0], "Only the sweep can be named here.", "run=outputs/sweeps/<stamp>")
        named = expanded(words[-1].partition("=")[2]) if words else None
        if "--best" in argv:
            best = os.path.relpath(leaderboard.best_run(named))
            if console.wants_json():
                console.say_json({"best": best})
            else:
                print(best)
            return 0
        if named is None:
            sweeps = [sweep for sweep in find_sweeps(Path("outputs/sweeps")) if readable_index(sweep)]
            if not sweeps:
                raise refuse("outputs/sweeps", "There is no sweep here yet.", "python train.py -m lora.r=8,16")
            named = sweeps[0]
        if console.wants_json():
            console.say_json(leaderboard.as_json(leaderboard.read_leaderboard(named)))
        else:
            leaderboard.show(named, sys.stdout)
        publish.refresh(named)
    except Refusal as refusal:
        console.say_refusal(refusal)
        return 2
    return 0
