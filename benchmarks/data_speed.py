"""Rows to tokens beside the tokenizer's own batch call on the same texts.

    python benchmarks/data_speed.py ruozhiba_qa.json --rows 1000,10000,100000

Three times, in processes of their own: `encode_batch` of the tokenizers library (texts are rendered before the clock starts),
the same through transformers' `tokenizer(texts)`, and this project's `prepare`, which reads the file, renders, tokenises,
masks, looks for double rows and lost ends, and writes the cache; and `prepare` again with the cache there. Texts go to each in
batches of 1,000. Prints the median seconds and the peak memory of `prepare`'s process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WAYS = ("encode_batch", "tokenizer", "prepare", "cached")


def main() -> None:
    """Make the rows and print a line for each number of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.source)))
        return
    from benchmarks.preflight_speed import make_rows

    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    heads = (
        "rows",
        "tokens",
        "encode_batch, s",
        "tokenizer(texts), s",
        "prepare, s",
        "share of encode_batch's speed",
        "cached, s",
    )
    print(f"| {' | '.join(heads)} | peak GiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "rows.jsonl"
            make_rows(args.source, file, count)
            found = {way: [run(way, file) for _ in range(args.rounds)] for way in WAYS}
        seconds = {way: statistics.median(r["seconds"] for r in runs) for way, runs in found.items()}
        share = seconds["encode_batch"] / seconds["prepare"]
        print(f"| {count:,} | {found['prepare'][0]['tokens']:,} | {seconds['encode_batch']:.2f} | {seconds['tokenizer']:.2f} "
              f"| {seconds['prepare']:.2f} | {share:.0%} | {seconds['cached']:.2f} | {found['prepare'][0]['peak_gib']:.2f} |",
              flush=True)  # fmt: skip


def run(way: str, file: Path) -> dict:
    """One measurement in a process of its own; `cached` reads what the last `prepare` left."""
    cache = file.parent / "cache"
    if way == "prepare" and (cache / "tokens").is_dir():
        import shutil

        shutil.rmtree(cache / "tokens")
    command = [sys.executable, __file__, str(file), "--way", way]
    environment = {**os.environ, "SFT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, file: Path) -> dict:
    """Seconds, tokens and peak memory of one way."""
    import functools
    import resource

    from hydra import compose, initialize_config_dir

    from sft.config.compose import register, to_settings
    from sft.data import prepare
    from sft.data.columns import find_shape
    from sft.data.sources import read_rows
    from sft.data.templates import choose_template, render_row
    from sft.environment import prepare_environment
    from sft.model.tokenizer import load_tokenizer

    prepare_environment()  # as in a run: tokenizers' own threads are off
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = to_settings(compose("config", overrides=["dataset=local", f"dataset.path={file}"]))
    tokenizer, stop_ids = load_tokenizer(settings.model)
    tokenizer(["Warm up."])
    import datasets  # noqa: F401  (a second, which a run takes for it in any case)

    tokens = 0
    if way in ("prepare", "cached"):
        began = time.perf_counter()
        tokens = prepare.prepare(settings, tokenizer, stop_ids).facts["train_tokens"]
        seconds = time.perf_counter() - began
    else:
        rows, _ = read_rows(settings.dataset, "train")
        shape = find_shape(rows, settings.dataset)
        template = choose_template(settings.dataset, shape, tokenizer)
        render = functools.partial(render_row, data=settings.dataset, shape=shape, template=template, tokenizer=tokenizer)
        call = {
            "encode_batch": lambda texts: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False),
            "tokenizer": lambda texts: tokenizer(texts, add_special_tokens=False, return_attention_mask=False),
        }[way]
        seconds = 0.0
        for start in range(0, len(rows), prepare.BATCH):
            texts = [render(rows[i]).text for i in range(start, min(start + prepare.BATCH, len(rows)))]
            began = time.perf_counter()
            call(texts)
            seconds += time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return {"seconds": seconds, "tokens": tokens, "peak_gib": peak}


if __name__ == "__main__":
    main()
