"""A program around llama.cpp (through cyllama): quantise a GGUF file, or measure one. Imports nothing of this project.

    python llama_cpp.py job.json completion.json
    python llama_cpp.py chat model.gguf           questions on standard input, tokens on standard output, a JSON value a line

It is a program because llama.cpp ends the process it runs in when something is wrong with a file.
"""

import json
import math
import os
import sys
from typing import Any

import cyllama.llama.llama_cpp as cpp

IGNORED = -100

F32 = 0
"""ggml's number for the type float32 (enum ggml_type)."""

OFF = 0
"""llama.cpp's LLAMA_FLASH_ATTN_TYPE_DISABLED."""


class Model(cpp.LlamaModel):
    """cyllama 0.2.18 asks its model for `n_vocab` when it hands out logits, and its model has none."""

    n_vocab = 0


def quantise(job: dict[str, Any]) -> dict:
    """Write `target` as `source` in the file type `kind`, and read it back: llama.cpp overlooks that its last write failed."""
    params = cpp.LlamaModelQuantizeParams()
    params.ftype = job["kind"]
    params.nthread = os.cpu_count() or 1
    cpp.model_quantize(job["source"], job["target"], params)
    try:
        load(job["target"])
    except Exception as error:
        raise RuntimeError("what was written cannot be read back: the disk is full or has an error") from error
    return {}


def load(path: str) -> Model:
    """The model in a GGUF file, on the CPU."""
    cpp.disable_logging()
    params = cpp.LlamaModelParams()
    params.n_gpu_layers = 0
    model = Model(path_model=path, params=params, verbose=False)
    model.n_vocab = model.get_vocab().n_vocab
    return model


class Reader:
    """Feeds tokens to a model, one sequence at a time."""

    def __init__(self, model: Model, length: int):
        params = cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = length + length % 2
        # Keys and values in float32, no flash attention: a proof compares weights, not ways of rounding. llama.cpp's own
        # defaults (float16) are for speed.
        params.type_k = params.type_v = F32
        params.flash_attn_type = OFF
        params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self.context = cpp.LlamaContext(model, params, verbose=False)
        self.batch = cpp.LlamaBatch(n_tokens=length + length % 2, embd=0, n_seq_max=1, verbose=False)
        self.at = 0

    def restart(self) -> None:
        """Forget what was read."""
        self.context.kv_cache_clear(True)
        self.at = 0

    def read(self, tokens: list[int], wanted: set[int]) -> None:
        """Read tokens after those read before; the logits of the positions in `wanted` are kept."""
        self.batch.clear()
        for i, token in enumerate(tokens):
            self.batch.add(token, self.at + i, [0], i in wanted)
        self.context.decode(self.batch)
        self.at += len(tokens)

    def logits(self, position: int) -> list[float]:
        """Logits after the token at `position` of the last read; -1 for its last token."""
        return self.context.get_logits_ith(position)


def load_adapter(job: dict[str, Any]) -> dict:
    """Load an adapter onto a model: llama.cpp refuses names and shapes that do not fit."""
    load(job["gguf"]).lora_adapter_init(job["adapter"])
    return {}


def measure(job: dict[str, Any]) -> dict:
    """Losses, greedy completions, and what the file has of its tokens: see sft.export.gguf.measure."""
    model = load(job["gguf"])
    vocab = model.get_vocab()
    both = job["rows"] + job["rejected"]
    longest = max([len(ids) for ids, _ in both] + [len(p) + job["max_new_tokens"] for p in job["prompts"]])
    reader = Reader(model, longest + 1)
    sums, counts = [], []
    for ids, labels in both:
        targets = [k for k in range(1, len(ids)) if labels[k] != IGNORED]
        reader.restart()
        reader.read(ids, {k - 1 for k in targets})
        sums.append(sum(_nll(reader.logits(k - 1), labels[k]) for k in targets))
        counts.append(len(targets))
    rows, means = len(job["rows"]), [s / n for s, n in zip(sums, counts, strict=True)]
    completions, finished = [], []
    for prompt in job["prompts"]:
        reader.restart()
        reader.read(prompt, {len(prompt) - 1})
        completion: list[int] = []
        while len(completion) < job["max_new_tokens"]:
            logits = reader.logits(-1)
            completion.append(max(range(len(logits)), key=logits.__getitem__))
            if completion[-1] in job["stop_ids"]:
                break
            reader.read(completion[-1:], {0})
        completions.append(completion)
        finished.append(bool(completion) and completion[-1] in job["stop_ids"])
    measured = {
        "loss": sum(sums[:rows]) / sum(counts[:rows]),
        "row_losses": means[:rows],
        "rejected_losses": means[rows:],
        "completions": completions,
        "finished": finished,
    }
    return {
        "measurement": measured,
        "tokens": [vocab.tokenize(text, True, True) for text in job["texts"]],
        "metadata": {model.meta_key_by_index(i): model.meta_val_str_by_index(i) for i in range(model.meta_count())},
        "ends": [i for i in job["stop_ids"] if vocab.is_eog(i)],
    }


def _nll(logits: list[float], label: int) -> float:
    import numpy

    values = numpy.asarray(logits, dtype=numpy.float64)
    top = values.max()
    return float(math.log(numpy.exp(values - top).sum()) + top - values[label])


def chat(path: str) -> None:
    """For each line of standard input (`ids`, `max_new_tokens`, `temperature`, `stop_ids`) print token ids, then null."""
    model = load(path)
    for line in sys.stdin:
        job = json.loads(line)
        reader = Reader(model, len(job["ids"]) + job["max_new_tokens"])
        reader.read(job["ids"], {len(job["ids"]) - 1})
        for _ in range(job["max_new_tokens"]):
            token = _choose(reader.logits(-1), job["temperature"])
            print(token, flush=True)
            if token in job["stop_ids"]:
                break
            reader.read([token], {0})
        print("null", flush=True)


def _choose(logits: list[float], temperature: float) -> int:
    import numpy

    values = numpy.asarray(logits, dtype=numpy.float64)
    if temperature <= 0:
        return int(values.argmax())
    weights = numpy.exp((values - values.max()) / temperature)
    return int(numpy.random.default_rng().choice(len(values), p=weights / weights.sum()))


if __name__ == "__main__":
    if sys.argv[1] == "chat":
        chat(sys.argv[2])
        sys.exit(0)
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    result = {"quantise": quantise, "measure": measure, "load_adapter": load_adapter}[job["do"]](job)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)
