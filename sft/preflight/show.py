"""What was found, on a terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from sft.data.tokenize import IGNORED
from sft.preflight.findings import OK, REFUSED, WARNING, Found
from sft.sanitize import shown


def show(found: Found) -> None:
    """Print everything that was found: the first rows, then each part's lines."""

    console = terminal()
    if found.prepared is not None:
        show_examples(console, found.prepared.facts, found.tokenizer)
    show_lines(console, found.lines)
    counts = [sum(line.state == state for line in found.lines) for state in (OK, WARNING, REFUSED)]
    console.print(f"\n{counts[0]} ok, {counts[1]} warnings, {counts[2]} refused; nothing was trained.")


STYLES = {"ok": "green", "warning": "yellow", "refused": "bold red"}


def terminal() -> Console:
    """A console on standard output that neither wraps nor colours by itself."""
    return Console(highlight=False, soft_wrap=True)


def show_examples(console: Console, facts: dict[str, Any], tokenizer: Any) -> None:
    """Print the first rows. A terminal gets colours; in a pipe the target tokens are bracketed."""
    colours = console.is_terminal
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    for number, example in enumerate(facts["examples"], 1):
        answers = [("", example)]
        if "rejected" in example:
            answers = [(", chosen", example), (", rejected", example["rejected"])]
        for which, one in answers:
            console.print(f"\n[bold]Row {number}{which}[/bold]  {len(one['input_ids'])} tokens\n")
            console.print(_coloured(one, special, colours))
        if "reference" in example:
            console.print(Text(shown(f"\nReference answer: {example['reference'] or 'none'}")))
    if "prompts" in facts:
        console.print("\nThe prompts end where the model is to speak; it learns from what its own completions earn.")
        return
    how = "green" if colours else "in ⟦⟧"
    console.print(f"\nTarget tokens are {how}; the others are only read.")


def _coloured(example: dict[str, Any], special: set[str], colours: bool) -> Text:
    """A row's text, its target tokens green or in brackets."""
    line, before = Text(), False
    for piece, label in zip(example["tokens"], example["labels"], strict=True):
        is_target = label != IGNORED
        if not colours and is_target != before:
            line.append("⟦" if is_target else "⟧")
        style = ("bold green" if is_target else "dim") + (" reverse" if piece in special else "")
        line.append(shown(piece), style if colours else "")
        before = is_target
    line.append("⟧" if before and not colours else "")
    return line


def show_lines(console: Console, lines: list[Any]) -> None:
    """Print the lines of a check (`part`, `state`, `text`, `fix`), each part under its name."""
    part = None
    for line in lines:
        if line.part != part:
            part = line.part
            console.print(Text(f"\n{part}", "bold"))
        for number, text in enumerate(line.text.splitlines()):
            state = Text(f"  {line.state if not number else '':<8} ", STYLES[line.state])
            console.print(state + Text(shown(text)))
        for fix in line.fix.splitlines():
            console.print(Text(shown(f"           hint: {fix}"), "dim"))
