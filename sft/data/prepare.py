"""Rows to tokens: read the data, render each row once, mask what is no target, and count what would be lost.

    read_rows -> select -> render_row -> encode -> fit_length -> cache

Both backends train on exactly what comes out of here, and `scripts/preview.py` shows the same.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import limits
from sft.config.fingerprint import row_seed
from sft.config.method import METHODS
from sft.config.schema import LossOn, MethodName, Overlong, Settings, Shape
from sft.data.audit import (
    COUNTED,
    Faults,
    SplitStats,
    audit,
    data_warnings,
    find_duplicates,
    holds_targets,
    note_warnings,
    notes_of,
    quantiles,
    refuse_faults,
    refuse_nothing_to_learn,
    room_for,
)
from sft.data.cells import RowFault, holds_something
from sft.data.columns import check_columns, column_names, find_shape, sort_columns
from sft.data.order import spread_first
from sft.data.pairs import compare_pairs, find_form, pair_up, pair_warnings, render_pair, take_pair_counts
from sft.data.prompt_rows import (
    cut_to_prompts,
    find_prompts,
    fit_prompts,
    has_answers,
    prompt_warnings,
    refuse_no_prompts,
    render_prompt,
    take_prompt_counts,
    too_long,
    without_reasoning,
)
from sft.data.sources import choose_indices, held_out_data, read_rows, select, small_files, source_of
from sft.data.templates import ALPACA, Rendered, choose_template, opens_answers, render_samples
from sft.data.token_cache import Prepared, cache_folder, only_one, read_cache
from sft.data.tokenize import IGNORED, first_words, label, not_restored, starts_with_bos, tokenise
from sft.errors import Refusal, first_line, refuse
from sft.storage import atomic

BATCH = 1000
"""Rows tokenised at a time."""

AHEAD = 2
"""Batches that are rendered before the first of them is labelled: tokenising has a thread of its own, and the rest takes about
as long."""

FIRST_ROWS = 20
"""Rows whose tokens are decoded again."""

SMALL = 8 * 2**20
"""Bytes of files that `check_small_files` reads, in some 0.1 s."""

FAR = 100
"""Characters a token, and at least FAR_LEAST in all, beyond which a row is surely too long and is not tokenised to its end."""

FAR_LEAST = 1_000_000


def prepare(settings: Settings, tokenizer, stop_ids: set[int]) -> Prepared:
    """Read, select, render, tokenise and cache the rows that `settings` names.

    `stop_ids` are the tokens that end an answer (the tokenizer's EOS and the model's other stop tokens).
    Raises Refusal for everything wrong with the data: unreadable files, missing columns, over-long or empty rows.
    """
    data = settings.dataset
    held_out = held_out_data(data)
    source = source_of(data)  # files that were read before need not be read again
    with _held_out():
        eval_source = source_of(held_out) if held_out else None
    known = source is not None and (held_out is None or eval_source is not None)
    prepared = read_cache(cache_folder(settings, tokenizer, stop_ids, [source, eval_source])) if known else None
    if prepared is None:
        rows, source = read_rows(data, data.split)
        with _held_out():
            eval_rows, eval_source = read_rows(held_out, held_out.split) if held_out else (None, None)
        folder = cache_folder(settings, tokenizer, stop_ids, [source, eval_source])
        with only_one(folder):  # of several processes one tokenises, the others wait for it and read
            prepared = read_cache(folder)
            if prepared is None:
                atomic.remove_leftovers(folder.parent, folder.name)  # of a process that was killed here
                atomic.remove_folder(folder)  # whatever is there could not be read
                with atomic.new_folder(folder, replace=False) as work:
                    facts = _tokenise_all(settings, tokenizer, stop_ids, (rows, eval_rows), (source, eval_source), work)
                    (work / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
                prepared = read_cache(folder)
    if prepared.eval is not None:
        prepared.facts["held_out_hash"] = _hash_rows(prepared.eval)
        prepared.eval = spread_first(prepared.eval)
    prepared.facts["source"] = source["name"]  # a file of the same contents may have been called otherwise
    prepared.facts |= {"files": source["files"]} if "files" in source else {}
    prepared.facts |= {"eval_source": eval_source["name"]} if eval_source else {}
    return prepared


def check_small_files(settings: Settings) -> None:
    """What `prepare` says of local files that cannot be read and of columns that are not there, in a moment: before anything
    large is imported. Files that are large, not text, or read by one's own function are left to it. Raises Refusal.
    """
    data = settings.dataset
    files = small_files(data, SMALL)
    if not files or data.format:
        return
    rows, source = read_rows(data, data.split)
    held_out, names = held_out_data(data), column_names(rows)
    if held_out and data.ignore_columns:
        return  # which may be of the held-out rows
    _find_columns(settings, rows, names, source["name"])


@contextlib.contextmanager
def _held_out() -> Iterator[None]:
    """Say of what is refused that it is a fault of the held-out rows."""
    try:
        yield
    except Refusal as refusal:
        prefixes = ["" if p.what.startswith("dataset.eval_") else "the held-out rows: " for p in refusal.problems]
        raise Refusal([replace(p, what=text + p.what) for text, p in zip(prefixes, refusal.problems, strict=True)]) from refusal


def _hash_rows(rows) -> str:
    """Hash of tokens and labels, by which two held-out losses are known to be of the same rows; of prompts and what rewards
    are given, by which held-out rewards are.
    """
    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels", "reference", "columns") if name in rows.column_names]
    names = names[:2] if "labels" in names else names
    for batch in rows.select_columns(names).iter(BATCH):
        digest.update(json.dumps([batch[name] for name in names]).encode())
    return digest.hexdigest()[:16]


def _tokenise_all(settings, tokenizer, stop_ids, tables, sources, work: Path) -> dict[str, Any]:
    """Write the tokens of both splits to files in `work`, a batch at a time, and return what was found.

    `tables` and `sources` are the rows and where they come from, then those of held-out rows of their own, or None.
    """
    (rows, eval_rows), (source, eval_source) = tables, sources
    names = column_names(rows) | (set() if eval_rows is None else column_names(eval_rows))
    shape, data, rejected, answered = _find_columns(settings, rows, names, source["name"])
    template = choose_template(data, shape, tokenizer)
    counts = {"read": len(rows)}
    train_index, eval_index = select(rows, data, row_seed(settings), counts)
    held_out_in = "the data"
    if eval_rows is not None:
        held_out_in = eval_source["name"]
        _check_held_out(eval_rows, _asked_of(eval_rows, data, names), shape, held_out_in, answered)
        eval_index = _choose_held_out(eval_rows, data, row_seed(settings), held_out_in)
        counts["read_eval"] = len(eval_rows)
    parts = {"train": (rows, train_index, None)}
    if eval_index:
        parts["eval"] = (rows if eval_rows is None else eval_rows, eval_index, held_out_in)

    render = _row_renderer(settings, data, rejected, names, shape, template, tokenizer)
    splits = _write_splits(parts, render, settings, tokenizer, stop_ids, counts, work)
    lost = _check_round_trip(splits["train"].texts, tokenizer, settings)
    _refuse_too_long(splits, settings)
    _add_counts(splits, counts)
    if settings.method.name == MethodName.grpo:
        refuse_no_prompts(splits, counts, settings)
    else:
        refuse_nothing_to_learn(splits, counts, shape, settings)

    facts: dict[str, Any] = {"source": source["name"], "data_hash": source["hash"], "shape": shape.value}
    facts["template"] = "alpaca" if template == ALPACA else template if data.template == "auto" else data.template
    facts |= _describe(splits, counts, shape, template, settings, tokenizer)
    if lost:
        found = f"The tokens of {lost} of the first {len(splits['train'].texts)} rows do not give their text back: "
        facts["warnings"].append(found + "the tokenizer does not know some of their characters.")
    for key in COUNTED:
        facts[key] = counts.pop(key, 0)
    facts |= {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token, "pad_token": tokenizer.pad_token}
    facts["adds_bos"] = starts_with_bos(tokenizer)
    facts["stop_tokens"] = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    facts["examples"] = splits["train"].examples
    return facts


def _choose_held_out(rows, data, seed: int, source: str) -> Sequence[int]:
    """Which rows of a file of held-out ones are taken. Raises Refusal where there are none."""
    index = choose_indices(rows, data, seed, source)[: data.max_eval_rows]
    if not index:
        fix = "dataset.keep={} dataset.drop={}   to filter nothing"
        raise refuse("dataset.keep / dataset.drop", f"None of the {len(rows)} held-out rows passes the filters.", fix)
    return index


def _row_renderer(settings, data, rejected, names: set[str], shape: Shape, template: str, tokenizer):
    """What makes the samples of a row by the method, with notes of the columns `names` that it does not use."""
    method = settings.method.name
    if method == MethodName.dpo:
        render = functools.partial(render_pair, chosen=data, rejected=rejected, shape=shape, tokenizer=tokenizer)
        names = names - {data.columns.rejected}
    elif method == MethodName.grpo:
        render = functools.partial(render_prompt, data=data, shape=shape, template=template, tokenizer=tokenizer)
    else:
        render = functools.partial(render_samples, data=data, shape=shape, template=template, tokenizer=tokenizer)
        if data.loss_on == LossOn.last:
            render = functools.partial(_last_answer, render)
    unused, meant = sort_columns(names, data, shape, template)
    if method == MethodName.grpo:  # rewards are given all columns
        unused, meant = [], without_reasoning(meant)
    return functools.partial(_render, render, unused, meant)


def _write_splits(parts, render, settings, tokenizer, stop_ids: set[int], counts: dict, work: Path) -> dict[str, SplitStats]:
    """Tokenise and write the rows of `parts`: (table, which of its rows, where they are from or None) by the split's name.
    Raises Refusal for rows that cannot be read, all together.
    """
    encode = functools.partial(_tokenise_near, tokenizer=tokenizer, limit=settings.model.max_seq_length)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    finish = functools.partial(label, bos=bos, eos=tokenizer.eos_token_id, stop_ids=stop_ids)
    splits, faults = {}, []
    for name, (table, index, source) in parts.items():
        faults.append(Faults(table, len(index), source))
        entries = _tokenise(index, render, encode, finish, faults[-1])
        entries = pair_up(entries, counts) if settings.method.name == MethodName.dpo else entries
        entries = cut_to_prompts(entries, table, counts) if settings.method.name == MethodName.grpo else entries
        splits[name] = _write_split(entries, work / f"{name}.arrow", settings, tokenizer, stop_ids)
    refuse_faults(faults, settings.dataset.skip_bad_rows)
    if settings.dataset.skip_bad_rows:
        counts["bad_rows"] = sum(one.count for one in faults)
    return splits


def _refuse_too_long(splits: dict[str, SplitStats], settings: Settings) -> None:
    """Raise Refusal if rows are too long and `dataset.overlong` does not say what to do with them."""
    longer = [f"{s.too_long} of {s.read} {name} rows" for name, s in splits.items() if s.too_long]
    if longer and settings.dataset.overlong == Overlong.error:
        whole = not any(s.notes["not counted"] for s in splits.values())
        say = too_long if settings.method.name == MethodName.grpo else _too_long
        raise say(longer, max(max(s.lengths) for s in splits.values()), whole, settings)


def _add_counts(splits: dict[str, SplitStats], counts: dict) -> None:
    """Add what each split counted, and the rows that each has."""
    for s in splits.values():
        for key, count in s.counts.items():
            counts[key] = counts.get(key, 0) + count
    counts |= {name: len(s.digests) for name, s in splits.items()}


def _describe(splits, counts: dict, shape: Shape, template: str, settings, tokenizer) -> dict[str, Any]:
    """Lengths, tokens, duplicates, notes and warnings of the rows; what the method counted is taken out of `counts`."""
    pairs, prompts = settings.method.name == MethodName.dpo, settings.method.name == MethodName.grpo
    prompt_facts = take_prompt_counts(counts) if prompts else {}
    pair_facts = take_pair_counts(counts) if pairs else {}
    blank = counts.pop("blank", 0)
    blank = 0 if shape == Shape.text else blank
    facts: dict[str, Any] = {"rows": counts, "lengths": {name: quantiles(s.lengths) for name, s in splits.items()}}
    facts |= {f"{name}_tokens": s.tokens for name, s in splits.items()}
    facts["trained_tokens"] = splits["train"].target_tokens
    facts["duplicates"] = find_duplicates(splits["train"], splits.get("eval"))
    facts["notes"] = notes = notes_of(splits)
    if prompts:
        facts["prompts"] = prompt_facts
        facts["warnings"] = prompt_warnings(counts | prompt_facts, facts, settings)
        facts["warnings"] += note_warnings(notes, settings)
        if template == "chat" and not opens_answers(tokenizer):
            facts["warnings"].append(
                "The chat template adds nothing where the model is to speak (add_generation_prompt): prompts end where the "
                "data's answers begin, and who serves the model by the template alone may end them elsewhere."
            )
    else:
        facts["warnings"] = data_warnings(counts, blank, facts["duplicates"], notes, settings)
    if pairs:
        compared, more = compare_pairs(splits["train"], splits.get("eval"))
        facts["pairs"] = pair_facts | compared
        facts["warnings"] += pair_warnings(pair_facts) + more
    return facts


def _find_columns(settings, rows, names: set[str], source: str) -> tuple[Shape, Any, Any, bool]:
    """(the rows' shape, the settings by which they are read, those of rejected answers or None, whether there are answers)."""
    data, rejected, answered = settings.dataset, None, True
    if settings.method.name == MethodName.dpo:
        shape, data, rejected = find_form(rows, data, source)
    elif settings.method.name == MethodName.grpo:
        shape, data = find_prompts(rows, data, source)
        answered = has_answers(data, shape)
    else:
        shape = find_shape(rows, data)
    check_columns(rows, _asked_of(rows, data, names), shape, source, answered)
    return shape, data, rejected, answered


def _asked_of(rows, data, names: set[str]):
    """The settings without the ignored columns that only the other ones of the rows to train on and held out have."""
    own = column_names(rows)
    return replace(data, ignore_columns=[one for one in data.ignore_columns if one in own or one not in names])


def _check_held_out(rows, data, shape: Shape, source: str, answered: bool) -> None:
    """`check_columns` of held-out rows; another column in the settings would not be that of the rows to train on."""
    try:
        check_columns(rows, data, shape, source, answered)
    except Refusal as refusal:
        fix = "the held-out rows need the columns of the rows to train on: rename them in that file"
        raise Refusal([replace(problem, fix=fix) for problem in refusal.problems]) from refusal


def _write_split(entries: Iterator[dict], file: Path, settings: Settings, tokenizer, stop_ids: set[int]) -> SplitStats:
    """Write the rows that are trained or evaluated on to an Arrow file; memory holds one batch of them at a time."""
    import numpy as np
    import pyarrow as pa

    stats, limit = SplitStats(), settings.model.max_seq_length
    numbers, lists = pa.list_(pa.int32()), METHODS[settings.method.name.value].columns
    pairs, prompts = settings.method.name == MethodName.dpo, settings.method.name == MethodName.grpo
    own = [("shared_length", pa.int32())] * pairs + [("columns", pa.large_string())] * prompts
    schema = pa.schema([*((name, numbers) for name in lists), *own, ("prompt_length", pa.int32()),
                        ("question", pa.string()), ("reference", pa.string()), ("row", pa.int64())])  # fmt: skip
    limit -= settings.method.max_completion_length * prompts
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(entries, BATCH)):
            stats.lengths.extend(map(_length, batch))
            stats.too_long += sum(_length(e) > limit for e in batch)
            first = batch[: FIRST_ROWS - len(stats.texts)]
            stats.texts += ["\n".join(first_words(e[side], 1000) for side in ("question", "reference")) for e in first]
            for entry in batch:
                notes = entry.pop("notes")
                stats.notes.update(notes)
                for note in notes:
                    stats.first.setdefault(note, entry["row"])
            kept = (fit_prompts if prompts else _fit_length)(batch, settings, stats.counts)
            audit(kept, stats.counts, tokenizer.bos_token_id, stop_ids)
            joined = {name: _concatenated([e[name] for e in kept]) for name in lists}
            for e in range(len(kept)):
                tokens = [
                    memoryview(joined[name][0])[slice(*joined[name][1][e : e + 2])] for name in lists if name.endswith("ids")
                ]
                stats.digests.append(_digest(tokens))
                if pairs:
                    stats.swapped.append(_digest(tokens[::-1]))
                    stats.prompts.append(_digest([tokens[0][: kept[e]["shared_length"]]]))
            stats.numbers.extend(e["row"] for e in kept)
            for name, (values, _) in joined.items():
                if name.endswith("ids"):
                    stats.tokens += len(values)
                else:
                    stats.target_tokens += int((np.frombuffer(values, np.int32) != IGNORED).sum())
            stats.examples += [_example(e, tokenizer) for e in kept[: 3 - len(stats.examples)]]
            if kept:
                arrays = [
                    [pa.Array.from_buffers(pa.int32(), len(x), [None, pa.py_buffer(x)]) for x in joined[n]] for n in lists
                ]
                columns = [pa.ListArray.from_arrays(offsets, values) for values, offsets in arrays]
                others = [pa.array([e[one.name] for e in kept], one.type) for one in list(schema)[len(lists) :]]
                writer.write_batch(pa.RecordBatch.from_arrays([*columns, *others], schema=schema))
    return stats


def _digest(tokens: list[memoryview]) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(tokens), digest_size=8).digest())


def _concatenated(lists: list[list[int]]) -> tuple[array, array]:
    """The numbers of all lists one after the other, and where the first begins and each one ends: Arrow's own form. Lists of
    Python's numbers take longer.
    """
    ends = array("i", itertools.accumulate(map(len, lists), initial=0))
    return array("i", list(itertools.chain.from_iterable(lists))), ends


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


def _tokenise(index: list[int], render, encode, finish, faults: Faults) -> Iterator[dict]:
    """Entries of the rows of `index`, with their numbers; `faults` has the table and gets the rows that cannot be rendered.

    The next batches are rendered while one is tokenised.
    """

    def entries(rendered: list[Rendered], numbers: list[int], encodings: Future) -> Iterator[dict]:
        for i, row, entry in zip(numbers, rendered, finish(rendered, encodings.result()), strict=True):
            entry |= {"answers": max(1, len(row.spans), row.ends), "row": i + 1}
            yield entry

    waiting: deque = deque()
    with ThreadPoolExecutor(1) as pool:
        for at in range(0, len(index), BATCH):
            rendered, numbers = _render_batch(index[at : at + BATCH], render, at == 0, faults)
            waiting.append((rendered, numbers, pool.submit(encode, rendered)))
            if len(waiting) > AHEAD:
                yield from entries(*waiting.popleft())
        while waiting:
            yield from entries(*waiting.popleft())


def _render_batch(index: list[int], render, first: bool, faults: Faults) -> tuple[list[Rendered], list[int]]:
    """The samples of some rows, and the row of each. The `first` row of all tells what the template takes; later other threads
    work beside this one, and the memory it takes cannot be told.
    """
    rendered, numbers = [], []
    with limits.seconds_limited() as begin_row:
        for i in index:
            begin_row()
            try:
                with limits.memory_limited() if first and not rendered else contextlib.nullcontext():
                    samples = render(faults.table[i])
                rendered += samples
                numbers += [i] * len(samples)
            except limits.OverLimit as error:
                fix = "model.chat_template=chatml   or remove the row"
                raise refuse(f"{faults.name(i + 1)}: its chat template", str(error), fix) from error
            except Refusal as refusal:
                faults.add(i + 1, refusal)
    return rendered, numbers


def _last_answer(render, row: dict) -> list[Rendered]:
    """The row with nothing but its last answer trained on."""
    return [replace(sample, spans=sample.spans[-1:]) for sample in render(row)]


def _render(render, unused: list[str], meant: dict[str, str], row: dict) -> list[Rendered]:
    """The row's samples, with a note of each column that is not used. Raises Refusal for whatever is wrong with it."""
    for column, fix in meant.items():
        if holds_something(row.get(column)):
            raise refuse("", f"Its column {column!r} carries meaning and is not used.", fix)
    try:
        samples = render(row)
        for sample in samples:
            sample.text.encode()  # half an emoji, as cut texts have it, cannot be tokenised
        samples[0].notes += [f"column {column}" for column in unused if holds_something(row.get(column))]
        return samples
    except UnicodeEncodeError as error:
        why = f"It holds half of a character ({error.object[error.start]!r}), as texts have it that were cut."
        raise refuse("", why, "mend or remove the row") from error
    except RowFault as error:
        raise refuse("", f"It cannot be rendered: {error}.", error.fix) from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # the row's own fault
        why = f"It cannot be rendered: {first_line(error)}."
        raise refuse("", why, "mend or remove the row, or set dataset.shape") from error


def _check_round_trip(texts: list[str], tokenizer, settings: Settings) -> int:
    """How many of the first rows' texts decoding does not restore. Raises Refusal if these are more than half."""
    lost = not_restored(texts, tokenizer)
    if 2 * len(lost) <= len(texts):
        return len(lost)
    text, back = lost[0]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False))
    begin = max(0, len(list(same)) - 20)
    meant, made = text[begin : begin + 60], back[begin : begin + 60]
    why = f"Its tokens do not give the text of the rows back: {meant!r} comes back as {made!r}. "
    why += "The model would learn other texts than those of the data."
    fix = 'in a local copy of the model, write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json\n'
    raise refuse(f"the tokenizer of model.name={settings.model.name}", why, fix + "or take another model")


# ------------------------------------------------------------------------------------- lengths and the mask


def _too_long(longer: list[str], longest: int, whole: bool, settings: Settings) -> Refusal:
    """`whole` says that every row was tokenised to its end, so that the longest is known."""
    why = f"{' and '.join(longer)} are longer (the longest has {longest if whole else f'more than {longest}'} tokens)."
    fix = f"{room_for(longest)}\n" if whole else ""
    fix += "dataset.overlong=drop   leaves them out\n"
    fix += "dataset.overlong=truncate   cuts their end: they no longer teach the model to stop"
    return refuse(f"model.max_seq_length={settings.model.max_seq_length}", why, fix)


def _length(entry: dict) -> int:
    """Tokens of a row; of a pair, those of the longer one."""
    return max(len(entry["input_ids"]), len(entry.get("rejected_ids", ())))


def _fit_length(entries: list[dict], settings: Settings, counts: dict) -> list[dict]:
    """Apply `dataset.overlong` and `dataset.loss_on`; rows with nothing to learn are left out and counted."""
    limit, policy = settings.model.max_seq_length, settings.dataset.overlong
    kept = []
    for entry in entries:
        cut = _length(entry) > limit
        if cut and policy == Overlong.drop:
            counts["dropped_rows"] = counts.get("dropped_rows", 0) + 1
            continue
        lists = [name for name in ("input_ids", "labels", "rejected_ids", "rejected_labels") if name in entry]
        if cut:
            entry |= {name: entry[name][:limit] for name in lists}
            entry["prompt_length"] = min(entry["prompt_length"], limit)
        if not all(holds_targets(entry[name]) for name in lists if name.endswith("labels")):
            counts["rows_without_labels"] = counts.get("rows_without_labels", 0) + 1
            continue
        if cut and entry["input_ids"] == entry.get("rejected_ids"):
            counts["equal_pairs"] = counts.get("equal_pairs", 0) + 1
            continue
        if cut:
            counts["truncated_rows"] = counts.get("truncated_rows", 0) + 1
            counts["rows_without_eos"] = counts.get("rows_without_eos", 0) + 1
        if settings.dataset.loss_on == LossOn.all:
            entry["labels"] = list(entry["input_ids"])
        kept.append(entry)
    return kept


def _example(entry: dict, tokenizer) -> dict[str, Any]:
    shown = _shown(entry["input_ids"], entry["labels"] or [IGNORED] * len(entry["input_ids"]), tokenizer)
    if "columns" in entry:
        shown["reference"] = entry["reference"]
    if "rejected_ids" in entry:
        shown["rejected"] = _shown(entry["rejected_ids"], entry["rejected_labels"], tokenizer)
    return shown


def _shown(ids: list[int], labels: list[int], tokenizer) -> dict[str, Any]:
    ids, labels = list(ids), list(labels)
    return {"text": tokenizer.decode(ids), "input_ids": ids, "labels": labels, "tokens": readable(ids, tokenizer)}


def readable(ids: list[int], tokenizer) -> list[str]:
    """One piece of text a token. A character that takes several tokens stands whole at its last one.

    Each piece is cut out of the text with the tokens before it: some tokenizers write no space before the first of a text.
    """
    pieces, before, waiting = [], [], []
    for i in ids:
        waiting.append(i)
        known = tokenizer.decode(before)
        text = tokenizer.decode(before + waiting)[len(known) :]
        if text.endswith("\ufffd") and len(waiting) < 4:  # UTF-8 takes at most four bytes a character
            pieces.append("")
        else:
            pieces.append(text)
            before, waiting = waiting, []
    return pieces
