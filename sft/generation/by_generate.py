"""Completions by transformers' `generate`, for models whose layers do not keep all keys and values (decoding.fits)."""

from collections.abc import Callable
from typing import Any

from sft.generation import batching, drawing
from sft.generation.decoding import Completion


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
        drawn: drawing.Drawing | None = None,
    ) -> list[list[Completion]]:
        """As decoding.Decoder does it: `generate` is left one token with a finite logit, the one that is drawn."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        copies = [len(keys) for keys in drawn.keys] if drawn else [1] * len(prompts)
        repeated = [prompt for prompt, count in zip(prompts, copies, strict=True) for _ in range(count)]
        ids, mask = batching.padded(repeated, 0, self.model.device)
        length, logs = ids.shape[1], []
        keys = torch.tensor([key for some in drawn.keys for key in some], device=ids.device) if drawn else None

        def choose(seen: Any, logits: Any) -> Any:
            check_stop()
            if not drawn:
                return logits
            place = torch.tensor([seen.shape[1] - length], device=ids.device)
            token, log_probs = drawing.draw(logits.float() / drawn.temperature, keys, place)
            logs.append(log_probs)
            return torch.full_like(logits, float("-inf")).scatter_(1, token[:, None], 0.0)

        config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0)
        with torch.no_grad(), batching.plain(self.model):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([choose])
            )
        log_probs = torch.stack(logs, 1).tolist() if logs else None
        found: list[list[Completion]] = [[] for _ in prompts]
        rows = iter(range(len(repeated)))
        generated = output[:, length:].tolist()
        for some, count in zip(found, copies, strict=True):
            for row in (next(rows) for _ in range(count)):
                kept = batching.until_end(generated[row], stop_ids)
                ended = bool(kept) and kept[-1] in stop_ids
                some.append(Completion(kept, log_probs[row][: len(kept)] if log_probs else [], ended))
        return found
