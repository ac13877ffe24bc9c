"""An Ollama Modelfile whose TEMPLATE, in Go's text/template, renders the prompts that the model was trained on.

Nothing is translated from Jinja. The training renderer is asked for conversations with marks in place of what people say,
the texts between the marks are put together again in Go, and the outcome is compared with the training renderer's on
further conversations. A template that cannot be taken apart this way gets no Modelfile, but a reason.
Formats: https://docs.ollama.com/modelfile and https://pkg.go.dev/text/template.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from sft.config.schema import Settings, Shape
from sft.data.cells import Turn
from sft.data.prompts import conversation_text
from sft.data.templates import choose_template
from sft.errors import ExportError, Refusal
from sft.storage.atomic import write_text

SYSTEM, QUESTION = "\ue010system\ue011", "\ue010question\ue011"

POSITIONS = ("only", "first", "middle", "last")
"""Where a question can stand among those of a conversation."""


@dataclass
class Pieces:
    """What stands around the contents of a conversation. A text may hold SYSTEM where the system prompt goes."""

    before: dict[tuple[str, bool], str]
    """Before a question, by its position and whether a system prompt is given. In a template text, which takes one
    question, all of the prompt: (`only`, ...) with QUESTION in it."""
    between: str = ""
    """Between a question and an answer that others follow."""
    end: str = ""
    """After the last question, where the model is to speak."""
    single: bool = False
    """Whether only the last question is part of the prompt."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the Modelfile has to know."""


def write_modelfile(
    folder: Path, gguf_name: str, settings: Settings, shape: Shape, tokenizer: Any, stop_tokens: Iterable[str]
) -> Path:
    """Write `Modelfile.<type>` for `model-<type>.gguf` in the same folder and return its path.

    `shape` is the one the rows had, and `stop_tokens` are the texts of the tokens that end an answer.
    Raises ExportError, and leaves no Modelfile, if Ollama could not render the prompt of training.
    """
    path = folder / f"Modelfile.{gguf_name.removeprefix('model-').removesuffix('.gguf')}"
    path.unlink(missing_ok=True)
    write_text(path, make_modelfile(gguf_name, find_pieces(settings, shape, tokenizer), stop_tokens))
    return path


def make_modelfile(gguf_name: str, pieces: Pieces, stop_tokens: Iterable[str]) -> str:
    """The text of a Modelfile."""
    stops = list(dict.fromkeys(stop_tokens))
    unfit = [stop for stop in stops if not stop.isprintable() or '"' in stop]
    if unfit:
        raise ExportError(f"no Modelfile: it cannot hold the end mark {unfit[0]!r}")
    lines = [
        f"# ollama create NAME -f Modelfile.{gguf_name.removeprefix('model-').removesuffix('.gguf')}",
        *(f"# {note}" for note in pieces.notes),
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{go_template(pieces)}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------- the pieces, by asking for them


def find_pieces(settings: Settings, shape: Shape, tokenizer: Any) -> Pieces:
    """Take the training template apart, and prove that the parts make its prompts again.

    Raises ExportError with the reason where they do not.
    """
    try:
        template = choose_template(settings.dataset, shape, tokenizer)
    except Refusal as refusal:
        raise ExportError(f"no Modelfile: {_why(refusal)}") from refusal

    def ask(turns: list[Turn]) -> str:
        return conversation_text(turns, settings, shape, tokenizer)

    try:
        pieces = _chat_pieces(ask) if template == "chat" else _text_pieces(ask)
        _prove(pieces, ask)
    except Refusal as refusal:
        raise ExportError(f"no Modelfile: {_why(refusal)}") from refusal
    if template == "chat":
        if "strftime_now" in tokenizer.chat_template:
            pieces.notes.append(f"The chat template writes today's date; here it is the day of the export, {date.today()}.")
        pieces.notes += _changed_contents(pieces, ask)
    return pieces


def _why(refusal: Refusal) -> str:
    """The reason of a refusal in one line."""
    return " ".join(refusal.problems[0].why.split())


def _chat_pieces(ask: Any) -> Pieces:
    before, between, end = {}, set(), set()
    notes: list[str] = []
    for has_system in (False, True):
        for count in (1, 2, 4):
            turns = _conversation([f"\ue010{k}\ue011" for k in range(2 * count - 1)], SYSTEM if has_system else "")
            try:
                text = ask(turns)
            except Refusal:
                if not has_system or "takes no system" in "".join(notes):
                    raise
                notes.append("The chat template takes no system prompt, so one that is given is left out.")
                break
            parts = re.split("\ue010\\d+\ue011", text)
            order = re.findall("\ue010(\\d+)\ue011", text)
            if order != [str(k) for k in range(2 * count - 1)] or text.count(SYSTEM) != int(has_system):
                raise ExportError("no Modelfile: the chat template moves, repeats or leaves out turns")
            between |= set(parts[1:-1:2])
            end.add(parts[-1])
            for k, part in enumerate(parts[:-1:2]):
                position = "only" if count == 1 else "first" if k == 0 else "last" if k == count - 1 else "middle"
                if before.setdefault((position, has_system), part) != part:
                    raise ExportError("no Modelfile: what stands before a question depends on how many there are")
    if len(between) != 1 or len(end) != 1:
        raise ExportError("no Modelfile: what the chat template puts around an answer depends on its place")
    before |= {(p, True): before[p, False] for p in POSITIONS if (p, True) not in before}
    return Pieces(before, between.pop(), end.pop(), notes=notes)


def _text_pieces(ask: Any) -> Pieces:
    before = {("only", False): ask([Turn("user", QUESTION)])}
    before["only", True] = ask([Turn("system", SYSTEM), Turn("user", QUESTION)])
    notes = ["Training had one question a row: of a conversation, the last question alone is part of the prompt."]
    if SYSTEM not in before["only", True]:
        before["only", True] = before["only", False]
        notes.append("The template has no place for a system prompt, so one that is given is left out.")
    return Pieces(before, single=True, notes=notes)


def _conversation(contents: list[str], system: str = "") -> list[Turn]:
    spoken = [Turn("assistant" if k % 2 else "user", content) for k, content in enumerate(contents)]
    return [Turn("system", system), *spoken] if system else spoken


def fill(pieces: Pieces, turns: list[Turn]) -> str:
    """The prompt that the pieces make of a conversation: what the Go template does, in Python."""
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    spoken = [turn for turn in turns if turn.role != "system"]
    questions = [k for k, turn in enumerate(spoken) if turn.role == "user"]
    if pieces.single:
        text = pieces.before["only", bool(system)]
        parts = re.split(f"({SYSTEM}|{QUESTION})", text)
        return "".join({SYSTEM: system, QUESTION: spoken[questions[-1]].content}.get(part, part) for part in parts)
    text = ""
    for k, turn in enumerate(spoken):
        if turn.role == "user":
            first, last = k == questions[0], k == questions[-1]
            position = ("only" if last else "first") if first else "last" if last else "middle"
            text += system.join(pieces.before[position, bool(system)].split(SYSTEM)) + turn.content
            text += pieces.end if last else ""
        else:
            text += (pieces.between if k < questions[-1] else "") + turn.content
    return text


TRIALS = [
    ["Why?"],
    ["天空为什么是蓝色的？", "因为瑞利散射。", "谢谢！\n再说一遍。"],
    ["a\n\nb\n- c", "1. {{ .System }} {% if x %}\n2. {{x}}", 'Say """that""" again', "\\n `x` %d", "5"],
    ["one", "First.", "two", "Second.", "three", "Third.", "four", "Fourth.", "five", "Fifth.", "six"],
]


def _prove(pieces: Pieces, ask: Any) -> None:
    """Compare the pieces' prompts with the training renderer's. Raises ExportError at the first that differs."""
    takes_system = any(SYSTEM in text for text in pieces.before.values())
    for contents in TRIALS:
        for system in ("", *(("Be brief.\n只用中文。", '"""{{ .Prompt }}') if takes_system else ())):
            turns = _conversation(contents[-1:] if pieces.single else contents, system)
            if ask(turns) != fill(pieces, turns):
                what = f"a conversation of {len(turns)} turns"
                raise ExportError(f"no Modelfile: the prompt of training cannot be put together from fixed pieces ({what})")


def _changed_contents(pieces: Pieces, ask: Any) -> list[str]:
    """What the chat template changes in contents and Go cannot: to be reported, because clients can do it themselves."""
    notes = []
    padded, thought = _conversation([" q \n"]), _conversation(["q", "<think>\nhm\n</think>\n\nx", "q"])
    for turns, note in (
        (padded, "The chat template cuts white space around a turn off; in Ollama it stays."),
        (thought, "The chat template takes thoughts out of earlier answers; in Ollama they stay."),
    ):
        try:
            same = ask(turns) == fill(pieces, turns)
        except Refusal:
            same = False
        notes += [] if same else [note]
    return notes


# -------------------------------------------------------------------------------------------------- the pieces in Go


def go_template(pieces: Pieces) -> str:
    """The pieces as a Go template over Ollama's .System and .Messages.

    All text stands in quotes inside of actions: so nothing in it can be read as Go, and nothing is lost to Ollama's reading
    of a Modelfile, which drops characters that do not print.
    """
    if pieces.single:
        whole = _choose("$.System", _go_text(pieces.before["only", True]), _go_text(pieces.before["only", False]))
        return _lines(
            '{{ $question := "" }}{{ $answer := "" }}',
            "{{ range .Messages }}",
            '{{ if eq .Role "user" }}{{ $question = .Content }}{{ $answer = "" }}',
            '{{ else if eq .Role "assistant" }}{{ $answer = .Content }}{{ end }}',
            "{{ end }}",
            f"{whole}{{{{ $answer }}}}",
        )
    before = {
        position: _choose("$.System", _go_text(pieces.before[position, True]), _go_text(pieces.before[position, False]))
        for position in POSITIONS
    }
    opening = _choose("eq $i $last", before["only"], before["first"])
    later = _choose("eq $i $last", before["last"], before["middle"])
    return _lines(
        "{{ $first := -1 }}{{ $last := -1 }}",
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}',
        "{{ if lt $first 0 }}{{ $first = $i }}{{ end }}{{ $last = $i }}",
        "{{ end }}{{ end }}",
        "{{ range $i, $m := .Messages }}",
        '{{ if eq $m.Role "user" }}',
        _choose("eq $i $first", opening, later),
        f"{{{{ $m.Content }}}}{{{{ if eq $i $last }}}}{_go_text(pieces.end)}{{{{ end }}}}",
        '{{ else if eq $m.Role "assistant" }}',
        f"{{{{ if lt $i $last }}}}{_go_text(pieces.between)}{{{{ end }}}}{{{{ $m.Content }}}}",
        "{{ end }}{{ end }}",
    )


def _lines(*lines: str) -> str:
    """Lines of a Go template whose line breaks and indents are not part of its text."""
    return "\n".join(line.replace("{{ ", "{{- ", 1) for line in lines if line)


def _choose(condition: str, then: str, other: str) -> str:
    return then if then == other else f"{{{{ if {condition} }}}}{then}{{{{ else }}}}{other}{{{{ end }}}}"


def _go_text(text: str) -> str:
    """A text as Go actions, with the marks as the variables they stand for."""
    actions = []
    for part in re.split(f"({SYSTEM}|{QUESTION})", text):
        if part in (SYSTEM, QUESTION):
            actions.append("{{ $.System }}" if part == SYSTEM else "{{ $question }}")
        elif part:
            actions.append(f"{{{{ {go_string(part)} }}}}")
    return "".join(actions)


def go_string(text: str) -> str:
    """A text as a string constant of Go, in characters that print, and never with three quotes in a row."""
    known = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(known.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'
