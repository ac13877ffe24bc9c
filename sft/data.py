"""Rows to tokens: read the data, render each row once, mask what is not learnt, and count what would be lost.

    read_rows -> select -> render_row -> encode -> fit_length -> cache

Both backends train on exactly what comes out of here, and `scripts/preview.py` shows the same.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sft import durable, embedded
from sft.columns import check_columns, find_shape
from sft.errors import Problem, Refusal, first_line, refuse
from sft.render import ALPACA, IGNORED, choose_template, encode, render_row
from sft.rows import choose_indices, read_rows, select
from sft.runtime import row_seed
from sft.settings import LossOn, Overlong, Settings, Shape

BATCH = 1000
"""Rows tokenised at a time."""


@dataclass
class Prepared:
    """Tokenised rows, ready for the trainer."""

    train: Any
    """`datasets.Dataset` with `input_ids`, `labels`, `prompt_length`, `question`, `reference`, and `row`, its number in the
    data counted from 1; one entry a row."""
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
    eval_rows, eval_source = read_rows(data, data.eval_split) if data.eval_split else (None, None)
    folder = embedded.cache_dir() / "tokens" / _recipe(settings, tokenizer, stop_ids, [source, eval_source])
    prepared = _read_cache(folder)
    if prepared is None:
        with _only_one(folder):  # of several processes one tokenises, the others wait for it and read
            prepared = _read_cache(folder)
            if prepared is None:
                _write_cache(folder, _tokenise_all(settings, tokenizer, stop_ids, rows, eval_rows, source))
                prepared = _read_cache(folder)
    if prepared.eval is not None:
        prepared.facts["held_out_hash"] = _hash_rows(prepared.eval)
    prepared.facts["source"] = source["name"]  # a file of the same contents may have been called otherwise
    return prepared


def _only_one(folder: Path) -> FileLock:
    """A lock on what will be `folder`; the system lets go of it when its process ends, however that ends."""
    locks = folder.parent.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{folder.name}.lock")


def _hash_rows(rows) -> str:
    """Hash of tokens and labels, by which two held-out losses are known to be of the same rows."""
    return hashlib.sha256(json.dumps([rows["input_ids"][:], rows["labels"][:]]).encode()).hexdigest()[:16]


def _tokenise_all(settings, tokenizer, stop_ids, rows, eval_rows, source) -> Prepared:
    data = settings.dataset
    shape = find_shape(rows, data)
    check_columns(rows, data, shape, source["name"])
    template = choose_template(data, shape, tokenizer)
    counts = {"read": len(rows)}
    train_index, eval_index = select(rows, data, row_seed(settings), counts)
    if eval_rows is None:
        eval_rows = rows
    else:
        eval_index = choose_indices(eval_rows, data, row_seed(settings))[: data.max_eval_rows]
        counts["read_eval"] = len(eval_rows)
        check_columns(eval_rows, data, shape, f"{data.name} ({data.eval_split})")

    facts: dict[str, Any] = {"source": source["name"], "data_hash": source["hash"], "shape": shape.value}
    facts["template"] = "alpaca" if template == ALPACA else template if data.template == "auto" else data.template
    render = functools.partial(render_row, data=data, shape=shape, template=template, tokenizer=tokenizer)
    splits, lengths, longer, blank = {}, {}, [], 0
    for name, table, index in (("train", rows, train_index), ("eval", eval_rows, eval_index)):
        if not index and name == "eval":
            continue
        entries = list(_tokenise(table, index, render, tokenizer, stop_ids))
        lengths[name] = _quantiles([len(e["input_ids"]) for e in entries])
        too_long = sum(len(e["input_ids"]) > settings.model.max_seq_length for e in entries)
        longer += [f"{too_long} of {len(entries)} {name} rows"] if too_long else []
        splits[name] = _fit_length(entries, settings, counts)
        counts[name] = len(splits[name])
        blank += sum(not e["question"].strip() for e in splits[name]) if shape != Shape.text else 0
    if longer and data.overlong == Overlong.error:
        raise _too_long(longer, max(q["max"] for q in lengths.values()), settings)
    _refuse_nothing_to_learn(splits, counts, shape, settings)
    facts |= {"rows": counts, "lengths": lengths, "warnings": _data_warnings(counts, blank, settings)}
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
                rendered.append(render(rows[i]))
                rendered[-1].text.encode()  # half an emoji, as cut texts have it, cannot be tokenised
            except Refusal as refusal:
                raise Refusal([Problem(f"row {i + 1} of the data: {p.what}", p.why, p.fix) for p in refusal.problems]) from None
            except UnicodeEncodeError as error:
                why = f"It holds half of a character ({error.object[error.start]!r}), as texts have it that were cut."
                raise refuse(f"row {i + 1} of the data", why, "mend or remove the row") from error
            except (ValueError, TypeError, AttributeError, KeyError) as error:  # the row's own fault
                why = f"It cannot be rendered: {first_line(error)}."
                raise refuse(f"row {i + 1} of the data", why, "mend or remove the row, or set dataset.shape") from error
        for i, entry in zip(index[at : at + BATCH], encode(rendered, tokenizer, stop_ids), strict=True):
            yield {**entry, "row": i + 1}


# ------------------------------------------------------------------------------------- lengths and the mask


def _too_long(longer: list[str], longest: int, settings: Settings) -> Refusal:
    why = f"{' and '.join(longer)} are longer (the longest has {longest} tokens)."
    fix = f"model.max_seq_length={-(-longest // 64) * 64}\ndataset.overlong=drop   leaves them out\n"
    fix += "dataset.overlong=truncate   cuts their end: they no longer teach the model to stop"
    return refuse(f"model.max_seq_length={settings.model.max_seq_length}", why, fix)


def _fit_length(entries: list[dict], settings: Settings, counts: dict) -> list[dict]:
    """Apply `dataset.overlong` and `dataset.loss_on`; rows with nothing to learn are left out and counted."""
    limit, policy = settings.model.max_seq_length, settings.dataset.overlong
    kept = []
    for entry in entries:
        cut = len(entry["input_ids"]) > limit
        if cut and policy == Overlong.drop:
            counts["dropped_rows"] = counts.get("dropped_rows", 0) + 1
            continue
        if cut:
            entry["input_ids"], entry["labels"] = entry["input_ids"][:limit], entry["labels"][:limit]
            entry["prompt_length"] = min(entry["prompt_length"], limit)
        if not _count_learnt(entry["labels"]):
            counts["rows_without_labels"] = counts.get("rows_without_labels", 0) + 1
            continue
        if cut:
            counts["truncated_rows"] = counts.get("truncated_rows", 0) + 1
            counts["rows_without_eos"] = counts.get("rows_without_eos", 0) + 1
        if settings.dataset.loss_on == LossOn.all:
            entry["labels"] = list(entry["input_ids"])
        merged = entry.pop("boundary_merge")
        counts["rows_with_boundary_merge"] = counts.get("rows_with_boundary_merge", 0) + merged
        kept.append(entry)
    return kept


def _count_learnt(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)


def _refuse_nothing_to_learn(splits: dict[str, list], counts: dict, shape: Shape, settings: Settings) -> None:
    """Refuse a split in which no row is left, with the reason that most of its rows went for."""
    for name, entries in splits.items():
        if entries:
            continue
        rows = "None of the rows to train on" if name == "train" else "None of the held-out rows"
        limit = f"model.max_seq_length={settings.model.max_seq_length}"
        if counts.get("dropped_rows"):
            what, why, fix = f"dataset.overlong=drop {limit}", "is short enough", "raise model.max_seq_length"
        elif settings.dataset.overlong == Overlong.truncate and counts.get("rows_without_labels"):
            what, why, fix = f"dataset.overlong=truncate {limit}", "has an answer left to learn", "raise model.max_seq_length"
        else:
            role = {Shape.instruction: "output", Shape.prompt_completion: "completion"}.get(shape, shape.value)
            what = f"dataset.columns.{role}={getattr(settings.dataset.columns, role)}"
            why, fix = "has an answer to learn; all are empty", f"dataset.columns.{role}=<the column with the answers>"
        if name == "eval" and not settings.dataset.eval_split:
            fix += "\ndataset.eval_fraction=0   holds none out\ndataset.seed=...   holds others out"
        raise refuse(what, f"{rows} {why}.", fix)


def _data_warnings(counts: dict, blank: int, settings: Settings) -> list[str]:
    found = []
    limit = settings.model.max_seq_length
    if counts.get("truncated_rows"):
        found.append(f"{counts['truncated_rows']} rows were cut at {limit} tokens and lost their end mark.")
    if counts.get("dropped_rows"):
        found.append(f"{counts['dropped_rows']} rows over {limit} tokens were left out.")
    if counts.get("rows_without_labels"):
        reason = "an empty answer" if settings.dataset.overlong != Overlong.truncate else "an empty or cut-off answer"
        found.append(f"{counts['rows_without_labels']} rows have {reason} and were left out.")
    if blank:
        found.append(f"{blank} rows have an answer but no question.")
    if counts.get("rows_with_boundary_merge"):
        n = counts["rows_with_boundary_merge"]
        found.append(f"In {n} rows a token joins the prompt to the answer; put a line break before the answer, not a space.")
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


def _recipe(settings: Settings, tokenizer, stop_ids: set[int], sources: list[dict | None]) -> str:
    """Hash of everything that shapes the tokens: rows, settings, tokenizer and this code."""
    code = [
        (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("data.py", "render.py", "rows.py", "columns.py")
    ]
    parts = [
        [source and source["hash"] for source in sources],
        {k: str(v) for k, v in asdict(settings.dataset).items() if k not in ("path", "name", "seed")},
        settings.model.max_seq_length,
        row_seed(settings),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        sorted(stop_ids),
        code,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write_cache(folder: Path, prepared: Prepared) -> None:
    """Write beside the place and rename: the folder is complete or absent, whoever else writes the same tokens."""
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "labels": ListOf(Value("int32")),
            "prompt_length": Value("int32"),
            "question": Value("string"),
            "reference": Value("string"),
            "row": Value("int64"),
        }
    )
    durable.remove_folder(folder)  # whatever is there could not be read
    with durable.new_folder(folder, replace=False) as work:
        for name, entries in (("train", prepared.train), ("eval", prepared.eval)):
            if entries:
                Dataset.from_list(entries, features=features).to_parquet(work / f"{name}.parquet")
        (work / "facts.json").write_text(json.dumps(prepared.facts, ensure_ascii=False), encoding="utf-8")


def _read_cache(folder: Path) -> Prepared | None:
    """What `_write_cache` wrote; None where a part of it is missing or damaged."""
    from datasets import Dataset

    if durable.find_damage(folder):
        return None
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        splits = {}
        for name in ("train", "eval"):
            if facts["rows"].get(name):
                splits[name] = Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(folder / "arrow"))
                if len(splits[name]) != facts["rows"][name]:
                    return None
    except Exception:  # datasets raises many kinds for a damaged file; each means that the tokens are made again
        return None
    return Prepared(splits["train"], splits.get("eval"), facts)
