"""Seconds of greedy answers (sft/decode.py), with adapters and norms in few kernels and as the libraries write them.

    python benchmarks/answers_speed.py --model DIR                             on a GPU
    python benchmarks/answers_speed.py --model HuggingFaceTB/SmolLM2-135M-Instruct --tokens 96 --one-by-one     on the CPU

Four prompts of 80 random tokens, r 16 on seven projections, the two ways in turn, with adapters that have learnt nothing yet
and with others. The first go of each also sets up what libraries set up once, and reads them from the disk. A step is what the
last nine tenths of the tokens took. `--one-by-one` adds transformers' own `generate`, asked one prompt after the other.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Load the model, answer in turn, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one-by-one", action="store_true")
    args = parser.parse_args()
    import torch
    from transformers import GenerationConfig

    from sft import decode, lora, models
    from sft.lora import base_of
    from sft.settings import ModelSettings, Settings

    settings = Settings(model=ModelSettings(name=args.model, load_in_4bit=False))
    model = lora.attach(models.load_model(settings, "transformers")[0], settings, "transformers").eval()
    base = base_of(model)
    ids = torch.randint(5, 1000, (args.prompts, 80), device=base.device)

    def one_by_one(base, ids, mask, stop_ids, tokens, check_stop):
        config = GenerationConfig(do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        for prompt in ids:
            base.generate(input_ids=prompt[None], attention_mask=mask[:1], generation_config=config)
        return lambda: None

    ways = {"few kernels": decode.greedy, "as they are": decode._greedy}
    ways |= {"one by one": one_by_one} if args.one_by_one else {}

    def seconds(answer, tokens: int) -> float:
        wait(base.device)
        began = time.perf_counter()
        with torch.no_grad():
            answer(base, ids, torch.ones_like(ids), set(), tokens, lambda: None)()
        wait(base.device)
        return time.perf_counter() - began

    for adapters in ("that have learnt nothing", "of random weights"):
        print(f"adapters {adapters}")
        for _ in range(args.rounds):
            for words, answer in ways.items():
                few = max(1, args.tokens // 10)
                short, whole = seconds(answer, few), seconds(answer, args.tokens)
                print(f"  {words}: {whole:.2f} s, a step {1000 * (whole - short) / (args.tokens - few):.2f} ms", flush=True)
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=1e-3)


def wait(device) -> None:
    """Let a GPU finish what is queued."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
