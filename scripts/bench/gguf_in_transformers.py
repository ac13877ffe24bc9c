"""Are a GGUF file's greedy answers those of transformers? Both read the same file and answer the same held-out prompts.

    python scripts/bench/gguf_in_transformers.py outputs/<run> 16        # 16 prompts; `scripts/export.py` made the files

transformers unpacks the quantised weights to float32; llama.cpp computes with them as they are, and rounds what it multiplies
them with to 8 bits (q8_0 and the k-types) or 16 (f16). A difference that is left is therefore the runtimes' own, and not
the quantisation's, which export/verify.json tells.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.export import gguf, proof, verify
from sft.records import read_json

NEW_TOKENS = 48


def compare(file: Path, rows: list[proof.Row], prompts: int, stop_ids: list[int], pad: int) -> str:
    """One line of the table: how many answers are equal, and where the others part."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = proof.measure_torch(model, rows, prompts, NEW_TOKENS, stop_ids, pad)
    theirs = gguf.measure(file, rows, prompts, NEW_TOKENS, stop_ids, [])["measurement"]
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    gaps = [gap_at_parting(a, b, ours.tops[i]) for i, (a, b) in enumerate(pairs) if a != b]
    ties = sum(verify.is_near_tie(a, b, ours.tops[i], verify.TIE["float16"]) for i, (a, b) in enumerate(pairs) if a != b)
    told = ", ".join(f"{gap:.3f}" for gap in gaps) or "-"
    equal = len(pairs) - len(gaps)
    return f"| {file.name} | {ours.loss:.5f} | {theirs.loss - ours.loss:+.5f} | {equal} of {len(pairs)} | {ties} | {told} |"


def gap_at_parting(ours: list[int], theirs: list[int], tops: list[dict[int, float]]) -> float:
    """How much likelier transformers found its own token than llama.cpp's, in nats, where the two answers part."""
    at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None or theirs[at] not in tops[at]:
        return float("inf")
    return tops[at][ours[at]] - tops[at][theirs[at]]


def main() -> None:
    """Print the table for every GGUF file of a run."""
    run, prompts = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    rows = proof.read_rows(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    stop_ids = tokenizer.convert_tokens_to_ids(read_json(run / "preflight.json")["stop_tokens"])
    print("| file | loss in transformers | in llama.cpp | answers equal | near ties | gap where they part (nats) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for file in sorted((run / "export" / "gguf").glob("model-*.gguf")):
        print(compare(file, rows, prompts, stop_ids, tokenizer.pad_token_id), flush=True)


if __name__ == "__main__":
    main()
