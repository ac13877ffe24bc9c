"""A run whose answers never end: the longest that answers on a GPU can take, beside `seconds` in its run.json.

    python benchmarks/endless_answers.py model.name=DIR dataset=local dataset.path=rows.json dataset.template=alpaca

Takes what train.py takes. A model of random weights learns above all to end its answers, so that those after its training take
a fraction of what a real model's take.
"""

import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Run train.py with the end marks taken away from its answers, and print how long the run waits for these."""
    from sft import decode

    usual = decode.greedy

    def greedy(model, input_ids, attention_mask, stop_ids, *rest):
        wait, asking = timed(lambda: usual(model, input_ids, attention_mask, set(), *rest))

        def answers():
            found, waiting = timed(wait)
            words = f"{asking:.2f} s until they are asked for, {waiting:.2f} s of waiting"
            print(f"{len(found)} answers of {len(found[0])} tokens: {words}", flush=True)
            return found

        return answers

    decode.greedy = greedy
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def timed(action):
    """What `action` gives, and its seconds."""
    began = time.perf_counter()
    return action(), time.perf_counter() - began


if __name__ == "__main__":
    main()
