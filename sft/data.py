"""Rows to tokens: read the data, render each row once, mask what is not learnt, and count what would be lost.

    read_rows -> select -> render_row -> encode -> fit_length -> cache

Both backends train on exactly what comes out of here, and `scripts/preview.py` shows the same.
"""

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft import embedded
from sft.columns import check_columns, find_shape
from sft.errors import first_line, refuse
from sft.render import ALPACA, IGNORED, choose_template, encode, render_row
from sft.rows import choose_indices, read_rows, select
from sft.settings import DatasetSettings, LossOn, Overlong, Settings

BATCH = 1000
"""Rows tokenised at a time."""


@dataclass
class Prepared:
    """Tokenised rows, ready for the trainer."""

    train: Any
    """`datasets.Dataset` with `input_ids`, `labels`, `prompt_length`, `question`, `reference`; one entry a row."""
    eval: Any | None
    """The held-out rows in the same form, or None."""
    facts: dict[str, Any]
    """What was found and what was cut: the contents of preflight.json."""


def prepare(settings: Settings, tokenizer, stop_ids: set[int]) -> Prepared:
    """Read, select, render, tokenise and cache the rows that `settings` names.

    `stop_ids` are the tokens that end an answer (the tokenizer's EOS and the model's other stop tokens).
    Raises Refusal for everything wrong with the data: unreadable files, missing columns, over-long or empty rows.
    """
    data = settings.dataset
    rows, source = read_rows(data, data.split)
    eval_rows = read_rows(data, data.eval_split)[0] if data.eval_split else None
    recipe = _recipe(settings, tokenizer, stop_ids, source)
    folder = embedded.cache_dir() / "tokens" / recipe
    if not (folder / "facts.json").is_file():
        prepared = _tokenise_all(settings, tokenizer, stop_ids, rows, eval_rows, source)
        _write_cache(folder, prepared)
    return _read_cache(folder)


def _tokenise_all(settings, tokenizer, stop_ids, rows, eval_rows, source) -> Prepared:
    data = settings.dataset
    shape = find_shape(rows, data)
    check_columns(rows, data, shape, source["name"])
    template = choose_template(data, shape, tokenizer)
    counts = {"read": len(rows)}
    train_index, eval_index = select(rows, data, settings.seed, counts)
    if eval_rows is None:
        eval_rows = rows
    else:
        eval_index = choose_indices(eval_rows, data, settings.seed)[: data.max_eval_rows]
        counts["read_eval"] = len(eval_rows)

    facts: dict[str, Any] = {"source": source["name"], "data_hash": source["hash"], "shape": shape.value}
    facts["template"] = {ALPACA: "alpaca", "chat": "chat"}.get(template, "plain" if data.template == "plain" else data.template)
    render = functools.partial(render_row, data=data, shape=shape, template=template, tokenizer=tokenizer)
    splits, problems, lengths = {}, [], {}
    for name, table, index in (("train", rows, train_index), ("eval", eval_rows, eval_index)):
        if not index and name == "eval":
            continue
        entries = list(_tokenise(table, index, render, tokenizer, stop_ids))
        lengths[name] = _quantiles([len(e["input_ids"]) for e in entries])
        splits[name] = _fit_length(entries, settings, name, counts, problems)
        counts[name] = len(splits[name])
    if problems:
        raise refuse(*problems[0])
    _refuse_nothing_to_learn(splits["train"], counts, data)
    facts |= {"rows": counts, "lengths": lengths, "warnings": _data_warnings(counts, settings)}
    facts |= {f"{name}_tokens": sum(len(e["input_ids"]) for e in entries) for name, entries in splits.items()}
    facts["trained_tokens"] = sum(_count_learnt(e["labels"]) for e in splits["train"])
    for key in ("truncated_rows", "dropped_rows", "rows_without_labels", "rows_without_eos", "rows_with_boundary_merge"):
        facts[key] = counts.pop(key, 0)
    facts |= {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token, "pad_token": tokenizer.pad_token}
    facts["stop_tokens"] = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    facts["examples"] = [_example(entry, tokenizer) for entry in splits["train"][:3]]
    return Prepared(splits["train"], splits.get("eval"), facts)


def _tokenise(rows, index: list[int], render, tokenizer, stop_ids: set[int]) -> Iterator[dict]:
    for at in range(0, len(index), BATCH):
        rendered = []
        for i in index[at : at + BATCH]:
            try:
                rendered.append((i, render(rows[i])))
            except (ValueError, TypeError, AttributeError, KeyError) as error:  # the template's or the row's own fault
                raise refuse(f"row {i + 1} of the data", f"It cannot be rendered: {first_line(error)}") from error
            except Exception as error:
                if type(error).__module__.startswith("jinja2"):
                    raise refuse(f"row {i + 1} of the data", f"The chat template refuses it: {first_line(error)}") from error
                raise
        yield from encode([r for _, r in rendered], tokenizer, stop_ids)


# ------------------------------------------------------------------------------------- lengths and the mask


def _fit_length(entries: list[dict], settings: Settings, split: str, counts: dict, problems: list) -> list[dict]:
    """Apply `dataset.overlong` and `dataset.loss_on`; rows with nothing to learn are left out and counted."""
    limit, policy = settings.model.max_seq_length, settings.dataset.overlong
    too_long = sum(len(e["input_ids"]) > limit for e in entries)
    if too_long and policy == Overlong.error:
        longest = max(len(e["input_ids"]) for e in entries)
        problems.append(
            (
                f"model.max_seq_length={limit}",
                f"{too_long} of {len(entries)} {split} rows are longer (the longest has {longest} tokens).",
                f"model.max_seq_length={-(-longest // 64) * 64}\ndataset.overlong=drop   leaves them out\n"
                "dataset.overlong=truncate   cuts their end: they no longer teach the model to stop",
            )
        )
        return []
    kept = []
    for entry in entries:
        if len(entry["input_ids"]) > limit:
            if policy == Overlong.drop:
                counts["dropped_rows"] = counts.get("dropped_rows", 0) + 1
                continue
            counts["truncated_rows"] = counts.get("truncated_rows", 0) + 1
            counts["rows_without_eos"] = counts.get("rows_without_eos", 0) + 1
            entry["input_ids"], entry["labels"] = entry["input_ids"][:limit], entry["labels"][:limit]
            entry["prompt_length"] = min(entry["prompt_length"], limit)
        if not _count_learnt(entry["labels"]):
            counts["rows_without_labels"] = counts.get("rows_without_labels", 0) + 1
            continue
        if settings.dataset.loss_on == LossOn.all:
            entry["labels"] = list(entry["input_ids"])
        merged = entry.pop("boundary_merge")
        counts["rows_with_boundary_merge"] = counts.get("rows_with_boundary_merge", 0) + merged
        kept.append(entry)
    return kept


def _count_learnt(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)


def _refuse_nothing_to_learn(entries: list[dict], counts: dict, data: DatasetSettings) -> None:
    if entries:
        return
    if counts.get("dropped_rows"):
        why = f"All {counts['dropped_rows']} rows are longer than model.max_seq_length, so none is left."
        raise refuse("dataset.overlong=drop", why, "raise model.max_seq_length")
    empty = counts.get("rows_without_labels", 0)
    column = data.columns.output if data.columns.output else "output"
    why = f"The answer is empty in all {empty} rows, so there is nothing to learn."
    raise refuse(f"dataset.columns.output={column}", why, "dataset.columns.output=<the column with the answers>")


def _data_warnings(counts: dict, settings: Settings) -> list[str]:
    found = []
    if counts.get("truncated_rows"):
        found.append(
            f"{counts['truncated_rows']} rows were cut at {settings.model.max_seq_length} tokens and lost their end mark."
        )
    if counts.get("dropped_rows"):
        found.append(f"{counts['dropped_rows']} rows over {settings.model.max_seq_length} tokens were left out.")
    if counts.get("rows_without_labels"):
        found.append(f"{counts['rows_without_labels']} rows have an empty answer and were left out.")
    if counts.get("rows_with_boundary_merge"):
        n = counts["rows_with_boundary_merge"]
        found.append(f"In {n} rows a token joins the prompt to the answer; end the template with a line break or a space.")
    return found


def _quantiles(lengths: list[int]) -> dict[str, float]:
    import numpy as np

    p50, p90, p99 = (int(q) for q in np.percentile(lengths, [50, 90, 99]))
    mean = round(float(np.mean(lengths)), 1)
    return {"min": min(lengths), "p50": p50, "p90": p90, "p99": p99, "max": max(lengths), "mean": mean}


def _example(entry: dict, tokenizer) -> dict[str, Any]:
    ids, labels = list(entry["input_ids"]), list(entry["labels"])
    return {"text": tokenizer.decode(ids), "input_ids": ids, "labels": labels, "tokens": readable(ids, tokenizer)}


def readable(ids: list[int], tokenizer) -> list[str]:
    """One piece of text a token. A character that takes several tokens stands whole at its last one."""
    pieces, waiting = [], []
    for i in ids:
        waiting.append(i)
        text = tokenizer.decode(waiting)
        if text.endswith("\ufffd") and len(waiting) < 4:  # UTF-8 takes at most four bytes a character
            pieces.append("")
        else:
            pieces.append(text)
            waiting = []
    return pieces


# ----------------------------------------------------------------------------------------------- the cache


def _recipe(settings: Settings, tokenizer, stop_ids: set[int], source: dict) -> str:
    """Hash of everything that shapes the tokens: rows, settings, tokenizer and this code."""
    code = [
        (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("data.py", "render.py", "rows.py", "columns.py")
    ]
    parts = [
        source["hash"],
        {k: str(v) for k, v in asdict(settings.dataset).items() if k not in ("path", "name")},
        settings.model.max_seq_length,
        settings.seed,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        sorted(stop_ids),
        code,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write_cache(folder: Path, prepared: Prepared) -> None:
    """Write beside the place and rename: the folder is complete or absent."""
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "labels": ListOf(Value("int32")),
            "prompt_length": Value("int32"),
            "question": Value("string"),
            "reference": Value("string"),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".tokens-", dir=folder.parent))
    try:
        for name, entries in (("train", prepared.train), ("eval", prepared.eval)):
            if entries:
                Dataset.from_list(entries, features=features).to_parquet(work / f"{name}.parquet")
        (work / "facts.json").write_text(json.dumps(prepared.facts, ensure_ascii=False), encoding="utf-8")
        try:
            work.rename(folder)
        except OSError:  # another run wrote the same tokens first
            if not (folder / "facts.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _read_cache(folder: Path) -> Prepared:
    from datasets import Dataset

    splits = {}
    for name in ("train", "eval"):
        file = folder / f"{name}.parquet"
        splits[name] = Dataset.from_parquet(str(file), cache_dir=str(folder / "arrow")) if file.is_file() else None
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Prepared(splits["train"], splits["eval"], facts)
