"""Completions by transformers' `generate`, for models whose layers do not keep all keys and values (decoding.fits)."""

from collections.abc import Callable
from typing import Any

from sft.generation import batching, sampling_noise
from sft.generation.decoding import Completion, Drawing


class Decoder:
    """What decoding.Decoder is, slower: a prompt goes through the model once for each of its completions."""

    def __init__(self, model: Any, rows: int, places: int):
        self.model, self.rows, self.places = model, rows, places

    def complete(
        self,
        prompts: list[list[int]],
        stop_ids: set[int],
        max_new_tokens: int,
        check_stop: Callable[[], None],
        drawing: Drawing | None = None,
    ) -> list[list[Completion]]:
        """As decoding.Decoder does it: the likeliest token of logits with noise is a draw."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        copies = [len(keys) for keys in drawing.keys] if drawing else [1] * len(prompts)
        repeated = [prompt for prompt, count in zip(prompts, copies, strict=True) for _ in range(count)]
        ids, mask = batching.padded(repeated, 0, self.model.device)
        length, logs = ids.shape[1], []
        if drawing:
            vocabulary = sampling_noise.tokens(self.model.config.get_text_config().vocab_size, ids.device)
            keys = torch.tensor([key for some in drawing.keys for key in some], dtype=torch.int32).to(ids.device)

        def draw(seen: Any, logits: Any) -> Any:
            check_stop()
            if not drawing:
                return logits
            logits = logits.float() / drawing.temperature
            place = torch.tensor([seen.shape[1] - length], device=ids.device)
            noisy = sampling_noise.gumbel(keys, place, vocabulary).add_(logits)
            best = noisy.argmax(-1, keepdim=True)
            logs.append(torch.log_softmax(logits, -1).gather(1, best)[:, 0])
            return noisy

        config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0)
        with torch.no_grad(), batching.plain(self.model):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([draw])
            )
        log_probs = torch.stack(logs, 1).tolist() if logs else None
        found: list[list[Completion]] = [[] for _ in prompts]
        rows = iter(range(len(repeated)))
        said = output[:, length:].tolist()
        for some, count in zip(found, copies, strict=True):
            for row in (next(rows) for _ in range(count)):
                kept = batching.until_end(said[row], stop_ids)
                ended = bool(kept) and kept[-1] in stop_ids
                some.append(Completion(kept, log_probs[row][: len(kept)] if log_probs else [], ended))
        return found
