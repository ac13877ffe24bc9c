"""Tokens that are kept: a folder of the cache for the rows, settings, tokenizer and version that they were made with."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sft.config.fingerprint import row_seed
from sft.config.schema import MethodName, MethodSettings, Settings
from sft.storage import atomic, cache

TOKENS_VERSION = 2
"""Raise it when a row comes to be read, rendered, tokenised or counted in another way: the cache keeps tokens by it."""


OF_THE_SOURCE = ("path", "eval_path", "name", "seed", "format")
"""Settings of the data that the hashes of the sources, or the seed, stand for."""


@dataclass
class Prepared:
    """Tokenised rows, ready for the trainer."""

    train: Any
    """`datasets.Dataset` with `input_ids`, `labels`, `prompt_length`, `question`, `reference`, and `row`, its number in the
    data counted from 1; one entry a row. For rewards `input_ids` are the prompt's, and in place of labels there is `columns`,
    the raw row as JSON."""
    eval: Any | None
    """The held-out rows in the same form, or None."""
    facts: dict[str, Any]
    """What was found and what was cut: the contents of preflight.json."""


def token_counts(rows: Any, padded: bool = False) -> Any:
    """The tokens of each row of `Prepared.train` or `Prepared.eval`, as a numpy array; no row is read for it.

    Of a pair those of the prompt once and of both answers; where it is `padded`, twice those of its longer row.
    """
    counts = row_lengths(rows)
    if len(counts) == 1:
        return counts[0]
    if padded:
        return 2 * counts[0].clip(min=counts[1])
    return counts[0] + counts[1] - rows.data.column("shared_length").to_numpy()


def trained_lengths(counts: Any, method: MethodSettings, padded: bool = False) -> Any:
    """The tokens that are trained on for each row, from `token_counts`, at most: of a prompt with its completions, each of them
    with a prompt to itself where they are `padded`.
    """
    if method.name != MethodName.grpo:
        return counts
    completions = method.num_generations * method.max_completion_length
    return counts * (method.num_generations if padded else 1) + completions


def row_lengths(rows: Any) -> list[Any]:
    """The tokens of each row: of `input_ids` and, of pairs, of `rejected_ids`, each a numpy array."""
    import pyarrow.compute as pc

    names = [name for name in ("input_ids", "rejected_ids") if name in rows.column_names]
    return [pc.list_value_length(rows.data.column(name)).to_numpy() for name in names]


def only_one(folder: Path) -> FileLock:
    """A lock on what will be `folder`; the system lets go of it when its process ends, however that ends."""
    locks = folder.parent.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{folder.name}.lock")


# ----------------------------------------------------------------------------------------------- the cache


def cache_folder(settings: Settings, tokenizer, stop_ids: set[int], sources: list[dict | None]) -> Path:
    """The folder in the cache, named by a hash of all that shapes the tokens: rows, settings, tokenizer and TOKENS_VERSION."""
    parts = [
        [source and source["hash"] for source in sources],
        {k: str(v) for k, v in asdict(settings.dataset).items() if k not in OF_THE_SOURCE},
        settings.model.max_seq_length,
        *([f"{settings.method.name.value} 3"] if settings.method.name != MethodName.sft else []),
        *([settings.method.max_completion_length] if settings.method.name == MethodName.grpo else []),
        row_seed(settings),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        sorted(stop_ids),
        TOKENS_VERSION,
    ]
    return cache.cache_dir() / "tokens" / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_cache(folder: Path) -> Prepared | None:
    """What `prepare` wrote; None where a part of it is missing or damaged."""
    from datasets import Dataset

    if atomic.find_damage(folder):
        return None
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        splits = {}
        for name in ("train", "eval"):
            if facts["rows"].get(name):
                splits[name] = Dataset.from_file(str(folder / f"{name}.arrow"))  # mapped into memory, not read
                if len(splits[name]) != facts["rows"][name]:
                    return None
    except Exception:  # datasets raises many kinds for a damaged file; each means that the tokens are made again
        return None
    return Prepared(splits["train"], splits.get("eval"), facts)
