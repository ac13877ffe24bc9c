"""Rows to tokens: read the data, render each row once, mask what is not learnt, and count what would be lost.

    read_rows -> select -> render_row -> encode -> fit_length -> cache

Both backends train on exactly what comes out of here, and `scripts/preview.py` shows the same.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from sft import durable, embedded, limits
from sft.columns import NotText, check_columns, find_shape
from sft.errors import Problem, Refusal, first_line, refuse
from sft.render import (
    ALPACA,
    IGNORED,
    Rendered,
    choose_template,
    count_not_given_back,
    label,
    render_row,
    starts_with_bos,
    tokenise,
)
from sft.rows import choose_indices, read_rows, select, source_of
from sft.runtime import row_seed
from sft.settings import LossOn, Overlong, Settings, Shape

TOKENS_VERSION = 1
"""Raise it when a row comes to be read, rendered, tokenised or counted in another way: the cache keeps tokens by it."""
BATCH = 1000
"""Rows tokenised at a time."""
FIRST_ROWS = 20
"""Rows whose tokens are decoded again."""
FAR = 100
"""Characters a token, and at least FAR_LEAST in all, beyond which a row is surely too long and is not tokenised to its end."""
FAR_LEAST = 1_000_000
MOST_FAULTS = 1000
"""Rows with faults after which no further row is read."""


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


def token_counts(rows: Any) -> Any:
    """The tokens of each row of `Prepared.train` or `Prepared.eval`, as a numpy array; no row is read for it."""
    import pyarrow.compute as pc

    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()


def prepare(settings: Settings, tokenizer, stop_ids: set[int]) -> Prepared:
    """Read, select, render, tokenise and cache the rows that `settings` names.

    `stop_ids` are the tokens that end an answer (the tokenizer's EOS and the model's other stop tokens).
    Raises Refusal for everything wrong with the data: unreadable files, missing columns, over-long or empty rows.
    """
    data = settings.dataset
    known = source_of(data)  # a file that was read before need not be read again
    source, sources = known, [known, known if data.eval_split else None]
    prepared = _read_cache(_place(settings, tokenizer, stop_ids, sources)) if known else None
    if prepared is None:
        rows, source = read_rows(data, data.split)
        eval_rows, eval_source = read_rows(data, data.eval_split) if data.eval_split else (None, None)
        folder = _place(settings, tokenizer, stop_ids, [source, eval_source])
        with _only_one(folder):  # of several processes one tokenises, the others wait for it and read
            prepared = _read_cache(folder)
            if prepared is None:
                durable.remove_leftovers(folder.parent, folder.name)  # of a process that was killed here
                durable.remove_folder(folder)  # whatever is there could not be read
                with durable.new_folder(folder, replace=False) as work:
                    facts = _tokenise_all(settings, tokenizer, stop_ids, rows, eval_rows, source, work)
                    (work / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
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
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).iter(BATCH):
        digest.update(json.dumps([batch["input_ids"], batch["labels"]]).encode())
    return digest.hexdigest()[:16]


def _tokenise_all(settings, tokenizer, stop_ids, rows, eval_rows, source, work: Path) -> dict[str, Any]:
    """Write the tokens of both splits to files in `work`, a batch at a time, and return what was found."""
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
    encode = functools.partial(_tokenise_near, tokenizer=tokenizer, limit=settings.model.max_seq_length)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    finish = functools.partial(label, bos=bos, eos=tokenizer.eos_token_id, stop_ids=stop_ids)
    splits, faults = {}, Faults()
    for name, table, index in (("train", rows, train_index), ("eval", eval_rows, eval_index)):
        if index or name == "train":
            entries = _tokenise(table, index, render, encode, finish, faults)
            splits[name] = _write_split(entries, work / f"{name}.arrow", settings, tokenizer, stop_ids)
    faults.refuse()
    not_given_back = _check_round_trip(splits["train"].texts, tokenizer, settings)
    longer = [f"{s.too_long} of {s.read} {name} rows" for name, s in splits.items() if s.too_long]
    if longer and data.overlong == Overlong.error:
        whole = not any(s.notes["not counted"] for s in splits.values())
        raise _too_long(longer, max(max(s.lengths) for s in splits.values()), whole, settings)
    for s in splits.values():
        for key, count in s.counts.items():
            counts[key] = counts.get(key, 0) + count
    counts |= {name: len(s.digests) for name, s in splits.items()}
    _refuse_nothing_to_learn(splits, counts, shape, settings)
    blank = counts.pop("blank", 0)
    blank = 0 if shape == Shape.text else blank
    facts |= {"rows": counts, "lengths": {name: _quantiles(s.lengths) for name, s in splits.items()}}
    facts |= {f"{name}_tokens": s.tokens for name, s in splits.items()}
    facts["trained_tokens"] = splits["train"].learnt
    facts["duplicates"] = _find_duplicates(splits["train"], splits.get("eval"))
    notes = sum((s.notes for s in splits.values()), Counter())
    facts["warnings"] = _data_warnings(counts, blank, facts["duplicates"], notes, settings)
    if not_given_back:
        found = f"The tokens of {not_given_back} of the first {len(splits['train'].texts)} rows do not give their text back: "
        facts["warnings"].append(found + "the tokenizer does not know some of their characters.")
    for key in COUNTED:
        facts[key] = counts.pop(key, 0)
    facts |= {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token, "pad_token": tokenizer.pad_token}
    facts["adds_bos"] = starts_with_bos(tokenizer)
    facts["stop_tokens"] = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    facts["examples"] = splits["train"].examples
    return facts


COUNTED = ("truncated_rows", "dropped_rows", "rows_without_labels", "rows_without_eos", "rows_with_boundary_merge",
           "rows_with_two_bos", "rows_with_inner_eos")  # fmt: skip


@dataclass
class Split:
    """What is known of the rows of one split besides their tokens, which are in a file."""

    lengths: array = field(default_factory=lambda: array("q"))
    """Tokens of each row read, before anything is cut or left out."""
    digests: array = field(default_factory=lambda: array("Q"))
    """A hash of the tokens of each row kept."""
    numbers: array = field(default_factory=lambda: array("q"))
    """Its number in the data."""
    tokens: int = 0
    """Of the rows kept."""
    learnt: int = 0
    """How many of these are learnt."""
    too_long: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    """What was left out of the rows, by `Rendered.notes`."""
    texts: list[str] = field(default_factory=list)
    """Questions and answers of the first rows."""

    @property
    def read(self) -> int:
        """How many rows were tokenised."""
        return len(self.lengths)


def _write_split(entries: Iterator[dict], file: Path, settings: Settings, tokenizer, stop_ids: set[int]) -> Split:
    """Write the rows that are trained or evaluated on to an Arrow file; memory holds one batch of them at a time."""
    import pyarrow as pa

    split, limit = Split(), settings.model.max_seq_length
    numbers = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", numbers), ("labels", numbers), ("prompt_length", pa.int32()),
                        ("question", pa.string()), ("reference", pa.string()), ("row", pa.int64())])  # fmt: skip
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(entries, BATCH)):
            split.lengths.extend(len(e["input_ids"]) for e in batch)
            split.too_long += sum(len(e["input_ids"]) > limit for e in batch)
            split.texts += [f"{e['question'][:1000]}\n{e['reference'][:1000]}" for e in batch[: FIRST_ROWS - len(split.texts)]]
            for entry in batch:
                split.notes.update(entry.pop("notes"))
            kept = _fit_length(batch, settings, split.counts)
            _audit(kept, split.counts, tokenizer.bos_token_id, stop_ids)
            ids, ends = _end_to_end([e["input_ids"] for e in kept])
            labels, _ = _end_to_end([e["labels"] for e in kept])
            tokens = memoryview(ids)
            for start, end in itertools.pairwise(ends):
                split.digests.append(int.from_bytes(hashlib.blake2b(tokens[start:end], digest_size=8).digest()))
            split.numbers.extend(e["row"] for e in kept)
            split.tokens += len(ids)
            split.learnt += len(labels) - labels.count(IGNORED)
            split.examples += [_example(e, tokenizer) for e in kept[: 3 - len(split.examples)]]
            if kept:
                offsets, *values = (
                    pa.Array.from_buffers(pa.int32(), len(x), [None, pa.py_buffer(x)]) for x in (ends, ids, labels)
                )
                lists = [pa.ListArray.from_arrays(offsets, one) for one in values]
                others = [pa.array([e[field.name] for e in kept], field.type) for field in list(schema)[2:]]
                writer.write_batch(pa.RecordBatch.from_arrays([*lists, *others], schema=schema))
    return split


def _end_to_end(lists: list[list[int]]) -> tuple[array, array]:
    """The numbers of all lists one after the other, and where the first begins and each one ends: Arrow's own form. Lists of
    Python's numbers take longer.
    """
    ends = array("i", itertools.accumulate(map(len, lists), initial=0))
    return array("i", list(itertools.chain.from_iterable(lists))), ends


def _audit(kept: list[dict], counts: dict[str, int], bos: int | None, stop_ids: set[int]) -> None:
    """Count rows that begin with two BOS tokens, rows with an end mark inside an answer, and answers without a question."""
    for e in kept:
        merged, spans = e.pop("boundary_merge"), e.pop("answers")
        marks = {
            "rows_with_boundary_merge": merged,
            "rows_with_two_bos": bos is not None and e["input_ids"][:2] == [bos, bos],
            "rows_with_inner_eos": sum(e["labels"].count(i) for i in stop_ids) > spans,
            "blank": not e["question"].strip(),
        }
        for key, found in marks.items():
            counts[key] = counts.get(key, 0) + found


def _find_duplicates(train: Split, held_out: Split | None) -> dict[str, Any]:
    """Rows with the very same tokens: `held_out` ones that are trained on as well, and `train` ones that come again.

    `rows` names the first of the former as [row held out, row trained on], by their numbers in the data.
    """
    import numpy as np

    digests, numbers = np.asarray(train.digests, dtype=np.uint64), np.asarray(train.numbers)
    known, first = np.unique(digests, return_index=True)  # sorted, with the first row of each
    count, pairs = 0, []
    if held_out and len(held_out.digests):
        wanted = np.asarray(held_out.digests, dtype=np.uint64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        copies = np.flatnonzero(known[at] == wanted)
        count, pairs = len(copies), [[held_out.numbers[i], int(numbers[first[at[i]]])] for i in copies[:5]]
    return {"held_out": count, "train": len(digests) - len(known), "rows": pairs}


class Faults:
    """Rows that cannot be learnt from, by what is wrong with them."""

    def __init__(self) -> None:
        self.rows: dict[Problem, list[int]] = {}

    def add(self, number: int, refusal: Refusal) -> None:
        """Note what is wrong with a row."""
        for problem in refusal.problems:
            self.rows.setdefault(problem, []).append(number)

    def refuse(self) -> None:
        """Raise a Refusal of all of them, with how many rows each fault has and the first three."""
        problems = []
        for p, numbers in list(self.rows.items())[:5]:
            *first, last = map(str, numbers[:3])
            first = f"{', '.join(first)} and {last}" if first else last
            more = f" ({len(numbers)} such rows)" if len(numbers) > 3 else ""
            problems.append(
                Problem(f"row{'s'[: len(numbers) > 1]} {first} of the data{more}{': ' * bool(p.what)}{p.what}", p.why, p.fix)
            )
        if problems:
            left = sum(map(len, list(self.rows.values())[5:]))
            if left:
                problems[-1] = replace(problems[-1], why=f"{problems[-1].why} {left} more rows have other faults.")
            raise Refusal(problems)

    @property
    def many(self) -> bool:
        """Whether there are so many that the rest need not be looked at."""
        return sum(map(len, self.rows.values())) >= MOST_FAULTS


def _tokenise_near(rendered: list[Rendered], tokenizer, limit: int) -> list[Any]:
    """`tokenise`, but a row of far more characters than `limit` tokens can have only up to there, its spans too: its tokens
    beyond the limit are not used, and a text of 100 MB would take minutes and gigabytes.
    """
    far = max(FAR * limit, FAR_LEAST)
    near = [replace(row, text=row.text[:far]) for row in rendered]
    encodings = tokenise(near, tokenizer)
    for i, row in enumerate(rendered):
        if len(row.text) <= far:
            continue
        if len(encodings[i]) <= limit:  # tokens of very many characters: only the whole row tells
            encodings[i] = tokenise([row], tokenizer)[0]
            continue
        row.spans = [(begin, min(end, far)) for begin, end in row.spans if begin < far]
        row.notes.append("not counted")
    return encodings


def _tokenise(rows, index: list[int], render, encode, finish, faults: Faults) -> Iterator[dict]:
    """Entries of the rows of `index`, with their numbers. One batch is rendered while the one before is tokenised."""
    waiting: Any = None
    with ThreadPoolExecutor(1) as pool:
        for at in [*range(0, len(index), BATCH), None]:
            coming = None
            if at is not None:
                rendered, numbers = [], []
                with limits.seconds_limited() as begin_row:
                    for i in index[at : at + BATCH]:
                        begin_row()
                        try:
                            # The first row tells what the template takes; later the tokenizer's threads work beside this one.
                            with contextlib.nullcontext() if waiting or rendered else limits.memory_limited():
                                rendered.append(_render(render, rows[i]))
                            numbers.append(i)
                        except limits.OverLimit as error:
                            fix = "model.chat_template=chatml   or remove the row"
                            raise refuse(f"row {i + 1} of the data: its chat template", str(error), fix) from error
                        except Refusal as refusal:
                            faults.add(i + 1, refusal)
                            if faults.many:
                                return
                coming = rendered, pool.submit(encode, rendered), numbers
            if waiting:
                rendered, encodings, numbers = waiting
                entries = finish(rendered, encodings.result())
                for i, row, entry in zip(numbers, rendered, entries, strict=True):
                    yield {**entry, "answers": max(1, len(row.spans)), "row": i + 1}
            waiting = coming


def _render(render, row: dict):
    """The row rendered. Raises Refusal for whatever is wrong with it."""
    try:
        rendered = render(row)
        rendered.text.encode()  # half an emoji, as cut texts have it, cannot be tokenised
        return rendered
    except UnicodeEncodeError as error:
        why = f"It holds half of a character ({error.object[error.start]!r}), as texts have it that were cut."
        raise refuse("", why, "mend or remove the row") from error
    except NotText as error:
        raise refuse("", f"It cannot be rendered: {error}.", error.fix) from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # the row's own fault
        why = f"It cannot be rendered: {first_line(error)}."
        raise refuse("", why, "mend or remove the row, or set dataset.shape") from error


def _check_round_trip(texts: list[str], tokenizer, settings: Settings) -> int:
    """How many of the first rows' texts their tokens do not give back. Raises Refusal if these are more than half."""
    lost = count_not_given_back(texts, tokenizer)
    if 2 * lost <= len(texts):
        return lost
    ids = tokenizer(texts[0].strip()[:60], add_special_tokens=False)["input_ids"]
    why = (
        f"Its tokens do not give the text of the rows back: {texts[0].strip()[:60]!r} comes back as {tokenizer.decode(ids)!r}. "
    )
    why += "The model would learn other texts than those of the data."
    fix = 'in a local copy of the model, write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json\n'
    raise refuse(f"the tokenizer of model.name={settings.model.name}", why, fix + "or take another model")


# ------------------------------------------------------------------------------------- lengths and the mask


def _too_long(longer: list[str], longest: int, whole: bool, settings: Settings) -> Refusal:
    """`whole` says that every row was tokenised to its end, so that the longest is known."""
    why = f"{' and '.join(longer)} are longer (the longest has {longest if whole else f'more than {longest}'} tokens)."
    fix = f"model.max_seq_length={-(-longest // 64) * 64}\n" if whole else ""
    fix += "dataset.overlong=drop   leaves them out\n"
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
        kept.append(entry)
    return kept


def _count_learnt(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def _refuse_nothing_to_learn(splits: dict[str, Split], counts: dict, shape: Shape, settings: Settings) -> None:
    """Refuse a split in which no row is left, with the reason that most of its rows went for."""
    for name, split in splits.items():
        if split.digests:
            continue
        rows = "None of the rows to train on" if name == "train" else "None of the held-out rows"
        limit = f"model.max_seq_length={settings.model.max_seq_length}"
        if counts.get("dropped_rows"):
            what, why, fix = f"dataset.overlong=drop {limit}", "is short enough", "raise model.max_seq_length"
        elif settings.dataset.overlong == Overlong.truncate and counts.get("rows_without_labels"):
            what, why, fix = f"dataset.overlong=truncate {limit}", "has an answer left to learn", "raise model.max_seq_length"
        elif split.notes["reasoning"]:
            what, why = "the chat template", "has an answer that is learnt: it leaves out the reasoning of each"
            fix = "model.chat_template=<the file of a template that keeps it>"
        elif split.notes["weight"]:
            what, why = "the weights of the answers", "has an answer that is learnt: all have the weight 0"
            fix = "give the answers that are to be learnt the weight 1"
        else:
            role = {Shape.instruction: "output", Shape.prompt_completion: "completion"}.get(shape, shape.value)
            what = f"dataset.columns.{role}={getattr(settings.dataset.columns, role)}"
            why, fix = "has an answer to learn; all are empty", f"dataset.columns.{role}=<the column with the answers>"
        if name == "eval" and not settings.dataset.eval_split:
            fix += "\ndataset.eval_fraction=0   holds none out\ndataset.seed=...   holds others out"
        raise refuse(what, f"{rows} {why}.", fix)


def _data_warnings(counts: dict, blank: int, duplicates: dict[str, Any], notes: Counter, settings: Settings) -> list[str]:
    found = []
    limit = settings.model.max_seq_length
    if counts.get("truncated_rows"):
        found.append(f"{counts['truncated_rows']} rows were cut at {limit} tokens and lost their end mark.")
    if counts.get("dropped_rows"):
        found.append(f"{counts['dropped_rows']} rows over {limit} tokens were left out.")
    if counts.get("rows_without_labels"):
        reason = "an empty answer" if settings.dataset.overlong != Overlong.truncate else "an empty or cut-off answer"
        reason += ", or none that is learnt," if notes["reasoning"] or notes["weight"] else ""
        found.append(f"{counts['rows_without_labels']} rows have {reason} and were left out.")
    if blank:
        found.append(f"{blank} rows have an answer but no question.")
    if counts.get("rows_with_boundary_merge"):
        n = counts["rows_with_boundary_merge"]
        found.append(f"In {n} rows a token joins the prompt to the answer; put a line break before the answer, not a space.")
    if counts.get("rows_with_two_bos"):
        n = counts["rows_with_two_bos"]
        found.append(f"{n} rows begin with two BOS tokens: the template or the data writes one too many.")
    if counts.get("rows_with_inner_eos") and settings.dataset.loss_on == LossOn.answer:
        n = counts["rows_with_inner_eos"]
        found.append(f"{n} rows have an end mark in the middle of an answer: the model would learn to stop there.")
    if duplicates["held_out"]:
        held_out, trained = duplicates["rows"][0]
        found.append(
            f"{duplicates['held_out']} held-out rows are trained on as well, word for word (row {held_out} is row {trained}): "
            "the held-out loss looks better than it is. Remove the copies from the data."
        )
    return found + _note_warnings(notes, settings)


def _note_warnings(notes: Counter, settings: Settings) -> list[str]:
    """What was left out of rows, counted."""
    found = []
    if notes["reasoning"]:
        found.append(
            f"{notes['reasoning']} answers are read and not learnt, because the chat template leaves out their reasoning: "
            "learnt without it they would teach the model to answer at once. Rows with one answer each keep it."
        )
    if notes["weight"] and settings.dataset.loss_on == LossOn.all:
        found.append(
            f"{notes['weight']} answers have the weight 0 and are learnt all the same, because of dataset.loss_on=all."
        )
    if notes["tools"]:
        found.append(f"{notes['tools']} rows define tools, and the chat template has no place for them: they are left out.")
    keys = [f"{note.removeprefix('key ')} ({count})" for note, count in sorted(notes.items()) if note.startswith("key ")]
    if keys:
        found.append(f"Keys of turns that are not used, with their number: {', '.join(keys)}.")
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


def _place(settings: Settings, tokenizer, stop_ids: set[int], sources: list[dict | None]) -> Path:
    """The folder in the cache, named by a hash of all that shapes the tokens: rows, settings, tokenizer and TOKENS_VERSION."""
    parts = [
        [source and source["hash"] for source in sources],
        {k: str(v) for k, v in asdict(settings.dataset).items() if k not in ("path", "name", "seed")},
        settings.model.max_seq_length,
        row_seed(settings),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        sorted(stop_ids),
        TOKENS_VERSION,
    ]
    return embedded.cache_dir() / "tokens" / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _read_cache(folder: Path) -> Prepared | None:
    """What `prepare` wrote; None where a part of it is missing or damaged."""
    from datasets import Dataset

    if durable.find_damage(folder):
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
