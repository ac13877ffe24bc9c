"""Talk to a trained model in the terminal, through the template it was trained with.

    python scripts/chat.py run=outputs/<run>                                  the trained adapter
    python scripts/chat.py run=outputs/<run> prompt="Why is the sky blue?"    one completion, then the end
    python scripts/chat.py run=outputs/<run>/export/merged_16bit              an export: merged_16bit, merged_4bit
    python scripts/chat.py run=outputs/<run>/export/gguf/model-q8_0.gguf      or a GGUF file of the run
    python scripts/chat.py run=outputs/<run> against=base                     two completions side by side: the base's too
    python scripts/chat.py run=outputs/<run> against=outputs/<another run>    or those of another run

Further: max_new_tokens=256, temperature=0 (greedy, as in samples.jsonl), model.name=<folder> where the model that
was trained on is elsewhere now, model.trust_remote_code=true for a run that has that.
In the chat: /reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops a completion. Exit codes: 0, 1 failed, 2 refused.
"""

import difflib

from sft import console
from sft.cli.chat import Speaker, find_target
from sft.config.consent import WORD
from sft.errors import ExportError, Problem, Refusal
from sft.programs import as_called
from sft.sanitize import shown

OPTIONS = ("run", "against", "prompt", "max_new_tokens", "temperature", "model.name", "model.trust_remote_code")


@console.takes_json
def main(argv: list[str]) -> int:
    """Chat, or complete one prompt; returns the exit code."""
    if {"-h", "--help"} & set(argv) or not argv:
        print(as_called(__doc__))
        return 0
    try:
        options = read_options(argv)
        consent = "model.trust_remote_code" in options
        base = options.get("model.name")
        targets = [find_target(options["run"], consent, base)]
        if "against" in options:
            other = f"base:{targets[0].folder}" if options["against"] == "base" else options["against"]
            targets.append(find_target(other, consent, base if other.startswith("base:") else None))
        speakers = load(targets)
    except Refusal as refusal:
        console.say_refusal(refusal)
        return 2
    try:
        if "prompt" in options:
            ask(speakers, [[] for _ in speakers], options["prompt"], options)
        else:
            talk(speakers, options)
    except Refusal as refusal:
        console.say_refusal(refusal)
        return 2
    except ExportError as error:
        console.say(f"Failed: {error}")
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    finally:
        for speaker in speakers:
            speaker.close()
    return 0


def read_options(argv: list[str]) -> dict:
    """The options of the command line, checked. Raises Refusal with every problem."""
    options, problems = {}, []
    for text in argv:
        key, equals, value = text.lstrip("-").partition("=")
        if key not in OPTIONS or not equals:
            close = difflib.get_close_matches(key, OPTIONS, 1, 0.4)
            fix = f"{close[0]}={value or '...'}" if close else 'run=outputs/<run> prompt="..."'
            problems.append(Problem(text, f"A chat takes {', '.join(f'{o}=' for o in OPTIONS)}.", fix))
        elif key == "model.trust_remote_code" and text.lstrip("-") != WORD:
            problems.append(Problem(text, "It is said, or left out.", WORD))
        options[key] = value
    for key, kind, low, default in (("max_new_tokens", int, 1, "256"), ("temperature", float, 0, "0")):
        try:
            options[key] = kind(options.get(key, default))
        except ValueError:
            options[key] = -1
        if not options[key] >= low:
            problems.append(Problem(f"{key}={options[key]}", f"It has to be a number of at least {low}.", f"{key}={default}"))
    if not options.get("run"):
        problems.append(Problem(" ".join(argv), "It names no run.", "run=outputs/<run>"))
    if problems:
        raise Refusal(problems)
    return options


def load(targets: list) -> list[Speaker]:
    """Load each of them, with a quiet library around it."""
    from sft import environment

    environment.prepare_environment()
    environment.quiet_libraries()
    return [Speaker(target) for target in targets]


def talk(speakers: list[Speaker], options: dict) -> None:
    """Ask for questions until the end; a speaker with a chat template knows what was said before."""
    names = " and ".join(shown(s.target.name) for s in speakers)
    print(f"Talking to {names}. /reset forgets what was said, /quit ends.")
    if not all(s.remembers for s in speakers):
        print("The training's template has no place for earlier turns, so every question stands alone.")
    histories: list[list[dict]] = [[] for _ in speakers]
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if question == "/reset":
            histories = [[] for _ in speakers]
        elif question:
            try:
                ask(speakers, histories, question, options)
            except KeyboardInterrupt:
                print("  (stopped)")
            except Refusal as refusal:  # the chat template does not take these turns
                print(shown("\n".join(problem.why for problem in refusal.problems)) + " /reset forgets what was said.")
            # A question that not all have completed is not kept, so that all get the same.
            turns = min(len(history) for history in histories) // 2 * 2
            histories = [history[:turns] for history in histories]


def ask(speakers: list[Speaker], histories: list[list[dict]], question: str, options: dict) -> None:
    """Put one question to every speaker and show the completions; one streams, two stand side by side."""
    completions = []
    for speaker, history in zip(speakers, histories, strict=True):
        if not speaker.remembers:
            history.clear()
        history.append({"role": "user", "content": question})
        ids = speaker.prompt(history)
        say = (lambda text: print(shown(text), end="", flush=True)) if len(speakers) == 1 else (lambda text: None)
        completions.append(speaker.complete(ids, say, options["max_new_tokens"], options["temperature"]))
        history.append({"role": "assistant", "content": completions[-1]})
    print()
    if len(speakers) > 1:
        show_side_by_side([s.target.name for s in speakers], completions)


def show_side_by_side(names: list[str], completions: list[str]) -> None:
    """Two completions beside each other, or one under the other where the terminal is narrow."""
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    panels = [Panel(Text(shown(a)), title=Text(shown(n))) for n, a in zip(names, completions, strict=True)]
    if console.width < 80:
        console.print(Group(*panels))
        return
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    console.print(grid)
