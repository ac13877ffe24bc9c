"""From text to tokens and labels: which tokens are targets, where an answer ends, and which texts decoding does not restore."""

import itertools
from collections.abc import Iterable
from typing import Any

from sft.data.templates import Rendered

IGNORED = -100
"""Label of a token that is no target, as torch's cross entropy has it."""


def encode(rendered: list[Rendered], tokenizer, stop_ids: set[int]) -> Iterable[dict]:
    """Token ids and answer labels of rendered rows: BOS exactly once where the tokenizer wants one, an end mark last.

    Yields dicts with `input_ids`, `labels` (IGNORED outside the answers), `prompt_length` (tokens before the last
    answer), `question`, `reference`, `boundary_merge` (a token joins the prompt's end to the answer's start), and `notes`
    (`Rendered.notes`).
    """
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    return label(rendered, tokenise(rendered, tokenizer), bos, tokenizer.eos_token_id, stop_ids)


def tokenise(rendered: list[Rendered], tokenizer) -> list[Any]:
    """The `tokenizers.Encoding` of each row's text; other threads can work meanwhile.

    By the tokenizer's own batch call: transformers' would make Python lists of all that an encoding holds.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may bring either
    backend.no_padding()
    encodings = backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
    return [_with_cuts(row, encoding, backend) for row, encoding in zip(rendered, encodings, strict=True)]


def _with_cuts(row: Rendered, encoding: Any, backend) -> Any:
    """The encoding with control tokens of `row.literal` as plain text, and with no token that holds both an answer's end and
    what follows it.

    Where a template's end marks are no tokens of the tokenizer, `.` and `<|im_end|>` may share the token `.<`, which a model
    that stops never generates. The text is then tokenised in pieces that end with such answers.
    """
    if row.literal:
        encoding = _encode_pieces(row, [], backend)
    crossed = []
    for begin, end in row.spans:
        _, last = _tokens_of(encoding, begin, end) if end < len(row.text) else (None, None)
        if last is not None and encoding.token_to_chars(last)[1] > end:
            crossed.append(end)
    return _encode_pieces(row, crossed, backend) if crossed else encoding


def _encode_pieces(row: Rendered, cuts: list[int], backend) -> Any:
    """The encoding of the row's text in pieces: those of `row.literal` as plain text, the others cut at `cuts` besides."""
    inner = [*cuts, *(place for span in row.literal for place in span)]
    places = sorted({0, len(row.text), *(min(place, len(row.text)) for place in inner)})
    encodings = []
    for start, end in itertools.pairwise(places):
        backend.encode_special_tokens = any(a <= start < b for a, b in row.literal)
        try:
            encodings.append(backend.encode(row.text[start:end], add_special_tokens=False))
        finally:
            backend.encode_special_tokens = False
    merged = type(encodings[0]).merge(encodings, True)
    merged.set_sequence_id(0)  # one text again, in which characters are looked up
    return merged


def label(rendered: list[Rendered], encodings: list[Any], bos: int | None, eos: int, stop_ids: set[int]) -> Iterable[dict]:
    """What `encode` yields, from texts that are tokenised already. `bos` is None where the tokenizer puts none."""
    for row, encoding in zip(rendered, encodings, strict=True):
        ids = encoding.ids
        labels = [IGNORED] * len(ids)
        merged, prompt_length, tail = False, len(ids) if not row.spans else 0, None
        for begin, end in row.spans:
            first, last = _tokens_of(encoding, begin, end)
            if first is not None:
                labels[first : last + 1] = ids[first : last + 1]
                merged |= encoding.token_to_chars(first)[0] < begin
                prompt_length, tail = first, max(last, tail or 0)
        if tail is not None:
            # Nothing after the last answer can be a target: a template's closing line break, a question without an answer.
            del ids[tail + 1 :], labels[tail + 1 :]
            if ids[-1] not in stop_ids:  # the answer ends where generation stops
                ids.append(eos)
                labels.append(eos)
        if bos is not None and ids[:1] != [bos]:  # a template may have written it already
            ids, labels, prompt_length = [bos, *ids], [IGNORED, *labels], prompt_length + 1
        yield {
            "input_ids": ids, "labels": labels, "prompt_length": prompt_length,
            "question": row.question, "reference": row.reference, "boundary_merge": merged, "notes": row.notes,
        }  # fmt: skip


def _tokens_of(encoding: Any, begin: int, end: int) -> tuple[int | None, int | None]:
    """The first and the last token that hold a part of the characters from `begin` to `end`; (None, None) without any.

    The two ends are looked up, so that a row of thousands of tokens does not hand over thousands of pairs of offsets.
    """
    first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1) if end > begin else None
    if first is None or last is None or encoding.token_to_chars(first) is None:  # a character without a token of its own
        inside = [k for k, (a, b) in enumerate(encoding.offsets) if a < end and b > begin]
        return (inside[0], inside[-1]) if inside else (None, None)
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) and chars[0] < end and chars[1] > begin:
        last += 1  # a character may take several tokens, of which the first was found
    return first, last


def not_restored(texts: list[str], tokenizer) -> list[tuple[str, str]]:
    """The texts that decoding does not restore, but for outer white space and what the tokenizer's normaliser changes; each
    with what comes back.
    """
    backend, lost = tokenizer.backend_tokenizer, []
    for text, encoding in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
        back = backend.decode(encoding.ids, skip_special_tokens=False).strip()
        meant = [text] if backend.normalizer is None else [text, backend.normalizer.normalize_str(text)]
        if back not in [one.strip() for one in meant]:
            lost.append((text.strip(), back))
    return lost


def first_words(text: str, size: int) -> str:
    """At most `size` characters of a text, which ends between two words where there is a white space before."""
    if len(text) <= size:
        return text
    end = next((i for i in range(size, 0, -1) if text[i].isspace()), size)
    return text[:end]


def starts_with_bos(tokenizer) -> bool:
    """Whether this tokenizer puts a BOS before a text by itself, as Llama's does and Qwen's does not."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
