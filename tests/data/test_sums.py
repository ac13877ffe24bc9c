"""The shipped sums: what there is to add, each time once, with the right answer."""

import json

from sft.config.schema import ASSETS


def test_every_sum_of_two_numbers_to_twenty_is_there_once_with_its_answer():
    rows = [json.loads(line) for line in (ASSETS / "sums.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = [{"instruction": f"What is {a} + {b}? Answer with the number.", "answer": str(a + b)} for a in range(1, 21) for b in range(1, 21)]
    assert len(rows) == 400 and sorted(map(str, rows)) == sorted(map(str, wanted))
