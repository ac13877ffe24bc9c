"""Write rows of random words with lengths like a real instruction set's, for speed measurements.

    python benchmarks/make_rows.py rows.json --rows 1000
    python benchmarks/make_rows.py long.json --rows 100 --words 2000

The words are w0 ... w7999, one token each with a word-level tokenizer. Lengths follow a log-normal, 20 to 1,200 words, about
150 on average, which the Alpaca prompt brings to about 190 tokens.
"""

import argparse
import json
import random


def main() -> None:
    """Write `--rows` rows with `instruction` and `output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--words", type=int, help="as many in every row")
    args = parser.parse_args()
    rng = random.Random(0)
    rows = []
    for _ in range(args.rows):
        length = args.words or min(1200, max(20, int(rng.lognormvariate(4.65, 0.85))))
        words = [f"w{rng.randrange(8000)}" for _ in range(length)]
        cut = max(5, length // 5)
        rows.append({"instruction": " ".join(words[:cut]), "output": " ".join(words[cut:])})
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(rows, file)


if __name__ == "__main__":
    main()
