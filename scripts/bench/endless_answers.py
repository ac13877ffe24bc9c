"""A run whose answers never end: the longest that answers on a GPU can take, beside `seconds` in its run.json.

    python scripts/bench/endless_answers.py model.name=DIR dataset=local dataset.path=rows.json dataset.template=alpaca

Takes what train.py takes. A model of random weights learns above all to end its answers, so that those after its training take
a fraction of what a real model's take.
"""

import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Run train.py with the end marks taken away from its answers, and print how long these took."""
    from sft import decode

    usual = decode.greedy

    def greedy(model, input_ids, attention_mask, stop_ids, *rest):
        began = time.perf_counter()
        answers = usual(model, input_ids, attention_mask, set(), *rest)
        print(f"{len(answers)} answers of {len(answers[0])} tokens: {time.perf_counter() - began:.2f} s", flush=True)
        return answers

    decode.greedy = greedy
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
