"""The installed command: sft <word> ...

Each word takes what its program in a checkout takes: `sft train` is `python train.py`, `sft export` is
`python scripts/export.py`.
"""

import difflib
import glob
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path

from sft import __version__, console
from sft.paths import CONF
from sft.programs import VARIABLE
from sft.threads import spin_briefly

WORDS = {
    "init": ("my.csv", "begin with a file of your own, or --from notebook.ipynb: writes a preset"),
    "train": ("dataset=local dataset.path=my.csv", "train one run"),
    "preview": ("dataset=local dataset.path=my.csv", "show what would be trained on, token by token"),
    "preflight": ("dataset=local dataset.path=my.csv", "check everything, train nothing"),
    "sweep": ("lora.r=8,16 ...", "train a run for each combination"),
    "resume": ("outputs/<run>", "go on with a run that was stopped"),
    "show": ("run=outputs/<run>", "a run at a glance"),
    "leaderboard": ("run=outputs/sweeps/<sweep>", "the table of a sweep"),
    "export": ("run=outputs/<run> export=gguf", "make files of a run that other programs read"),
    "chat": ("run=outputs/<run>", "talk to a run, or to an export of it"),
    "doctor": ("", "what a run needs: is it here, and what mends it"),
    "install-gguf": ("", "install what GGUF exports need"),
}
"""Each word with an example of what follows it, and what it does."""

INIT = ("goal=chat", "goal=answer", "goal=preferences", "goal=rewards", "model=", "name=", "from=", "data=", "force=true")
"""What `sft init` takes besides settings."""

HYDRA = ("train", "preflight", "sweep", "preview")
"""Words that take the settings of a run, which Hydra completes in a shell."""


def main(argv: list[str] | None = None) -> int:
    """Do what the words ask for; returns the exit code. The libraries are loaded by the program that is called."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ[VARIABLE] = "1"
    spin_briefly()
    word, *rest = argv or ["--help"]
    if word in ("-h", "--help", "help"):
        print(overview())
        return 0
    if word == "--version":
        print(__version__)
        return 0
    if word in ("-sc", "--shell-completion"):
        return complete(rest)
    if word in ("train", "sweep", "preflight", "resume"):
        plain = [one for one in rest if one != "--json"]
        return import_module("sft.cli.train").run([*training_words(word, plain), *["--json"][: len(rest) - len(plain)]])
    if word in WORDS:
        name = {"chat": "talk"}.get(word, word.replace("-", "_"))
        return import_module(f"sft.cli.{name}").main(rest)
    if "--json" in argv:
        argv = [word for word in argv if word != "--json"]
        problem = {"what": f"sft {word}", "why": "There is no such word.", "fix": likeliest(argv) if argv else "sft --help"}
        with console.json_output():
            console.say_json({"refused": [problem]})
    else:
        console.say(f"There is no sft {shlex.quote(word)}.\nhint: {likeliest(argv)}")
    return 2


def overview() -> str:
    """The words, with what each does."""
    lines = [f"  {f'sft {word} {example}':<52} {about}" for word, (example, about) in WORDS.items()]
    return "\n".join(
        [
            "Fine-tune a language model on your own data.",
            "",
            *lines,
            "",
            "sft <word> --help says more; --json is for programs. Presets of your own: conf/ of the current folder.",
        ]
    )


def training_words(word: str, rest: list[str]) -> list[str]:
    """What `train` is given for this word."""
    if word == "sweep":
        return ["-m", *rest]
    if word == "preflight":
        return [*rest, "preflight.mode=only"]
    if word == "resume" and not (rest and rest[0].startswith(("-", "resume="))):
        return [f"resume={''.join(rest[:1]).removeprefix('run=')}", *rest[1:]]
    return rest


def likeliest(argv: list[str]) -> str:
    """The command that was probably meant."""
    word = argv[0]
    if word == "-m":
        return shlex.join(["sft", "sweep", *argv[1:]])
    if "=" in word or word.startswith("-"):
        return shlex.join(["sft", "train", *argv])
    close = difflib.get_close_matches(word.removesuffix(".py"), [*WORDS, "show_run", "install_gguf"], 1, 0.5)
    renamed = {"show_run": "show", "install_gguf": "install-gguf"}
    return shlex.join(["sft", renamed.get(close[0], close[0]), *argv[1:]]) if close else "sft --help   lists the words"


def complete(rest: list[str]) -> int:
    """Answer a shell: with the function that completes, or with what may end the line in COMP_LINE; returns the exit code."""
    before, _, last = os.environ.get("COMP_LINE", "").rpartition(" ")
    words = before.split()[1:]
    if not any(word.startswith("query=") for word in rest) or set(words[:1]) & set(HYDRA):
        os.environ["COMP_LINE"] = " ".join(["sft", *words[1:], last])
        at = words.index("--config-dir") if "--config-dir" in words else len(words)
        return import_module("sft.cli.train").run([*words[at : at + 2], "-sc", *rest])
    found = endings_of(words[0], last) if words else WORDS
    print("\n".join(word for word in found if word.startswith(last)))
    return 0


def endings_of(word: str, last: str) -> list[str]:
    """What may follow a word whose last part is typed so far: its own words, and files."""
    key, equals, begun = last.partition("=")
    if word == "doctor":
        return ["--json"]
    if equals and key == "model":
        return [f"model={file.stem}" for folder in (CONF, Path("conf")) for file in sorted((folder / "model").glob("*.yaml"))]
    if equals and key in ("run", "data", "from"):
        return [f"{key}={place}" for place in sorted(glob.glob(f"{glob.escape(begun)}*"))]
    return [*INIT, *sorted(glob.glob(f"{glob.escape(last)}*"))] if word == "init" else ["run="]
