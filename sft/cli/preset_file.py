"""A preset of one's own as a file: `conf/experiment/<name>.yaml` in the current folder, with a comment a line."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sft.cli.check import read_settings
from sft.config import presets
from sft.config.compose import escaped
from sft.config.keys import find_field
from sft.config.schema import Settings, field_docs
from sft.errors import Problem, refuse
from sft.paths import CONF
from sft.programs import as_called, by_name
from sft.sanitize import shown
from sft.storage.atomic import write_text
from sft.storage.jsonio import jsonable

RESERVED = ("null", "true", "false", "yes", "no", "on", "off", "inf", "nan")
"""Names that Hydra reads as a value."""

WIDTH = 118
"""Columns of a line with its comment."""

ORDER = ("model", "dataset", "lora", "method", "trainer", "samples", "export", "tracking")
"""In which groups of settings stand in the file."""

GROUP_COMMENTS = {
    "model": "the model; another file of conf/model/, or model.name=<hub id or folder>",
    "dataset": "rows of a file, a folder or the hub",
    "lora": "the adapter: rank 16; r8, r32, r64 and others in conf/lora/",
    "trainer": "how long and how fast it learns",
    "method": "what it learns from: answers (sft), preferences (dpo), rewards (grpo)",
    "tracking": "where curves go besides the run folder",
    "export": "what is made of the adapter at the end",
}

COMMENTS = {
    "dataset.path": "The file, looked up from where you type the command",
    "dataset.name": "Data set on the hub",
    "dataset.template": "How a row becomes text: the model's chat template, or auto, alpaca, plain, a text of your own",
    "dataset.eval_fraction": "Share of the rows held out, to see whether it gets better on rows it has not seen",
    "trainer.num_train_epochs": "How often each row is used",
    "trainer.learning_rate": "Try a half and the double of it: sweep=lr",
    "samples.prompts": "Questions of your own that it answers before and after training",
    "method.reward_funcs": "What a completion earns; your own: [rewards.py:function]",
    "method.reward_weights": "The weight of each reward",
}
"""Comments that say more to a beginner than the first words of a setting's docstring."""


def name_problems(name: str) -> list[Problem]:
    """What is wrong with the name of a preset."""
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII) or name.lower() in RESERVED:
        why = "A name has letters, digits, - and _, begins with a letter, and is no value such as true."
        return [Problem(f"name={name}", why, f"name={name_from(name)}")]
    if (CONF / "experiment" / f"{name}.yaml").is_file() and Path("conf").resolve() != CONF.resolve():
        why = "A preset of this name comes with the project, and yours would hide it."
        return [Problem(f"name={name}", why, f"name=my_{name}")]
    return []


def name_from(text: str) -> str:
    """A name for a preset, made of a file's."""
    name = re.sub(r"[^\w-]+", "_", text, flags=re.ASCII).strip("_-") or "data"
    taken = name.lower() in RESERVED or (CONF / "experiment" / f"{name}.yaml").is_file()
    return f"my_{name}" if taken or not name[0].isalpha() else name


def preset_text(name: str, about: list[str], choices: dict[str, str], values: dict[str, Any], comments: dict[str, str]) -> str:
    """The file's text: options of groups, then settings by their dotted keys, each with its comment."""
    lines = ["# @package _global_", f"# {as_called('python train.py')} {' '.join(_where())}experiment={name}"]
    lines += [f"# {_on_a_line(line)}" for line in about]
    if choices:
        lines.append("defaults:")
        lines += [
            _commented(f"  - override /{group}: {option}", GROUP_COMMENTS.get(group, "")) for group, option in choices.items()
        ]
    tree: dict[str, Any] = {}
    for key in sorted(values, key=lambda key: ORDER.index(first) if (first := key.partition(".")[0]) in ORDER else len(ORDER)):
        value = values[key]
        *above, last = key.split(".")
        table = tree
        for part in above:
            table = table.setdefault(part, {})
        table[last] = _Leaf(key, value)
    lines += ["", *_tree_lines(tree, comments)] if tree else []
    return "\n".join(lines) + "\n"


def write_preset(name: str, text: str, force: bool) -> tuple[Path, Settings]:
    """Write the file, if what is in it is accepted as a run's settings: (its path, the settings). Raises Refusal."""
    path = Path("conf", "experiment", f"{name}.yaml")
    if (path.exists() or path.is_symlink()) and not force:
        raise refuse(f"name={name}", f"There is a file {path} already.", f"force=true   writes it anew\nname={_free(name)}")
    settings = composed(name, text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        why = f"It cannot be written: {error.strerror}."
        raise refuse(str(path), why, "begin in a folder of your own: mkdir my_project && cd my_project") from error
    return path, settings


def composed(name: str, text: str) -> Settings:
    """The settings of `experiment=<name>` with this text. Raises Refusal."""
    with tempfile.TemporaryDirectory() as folder:
        new = f"{name}.new"  # one of its own name in conf/ would win over that of --config-dir
        file = Path(folder, "experiment", f"{new}.yaml")
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        return read_settings(CONF, ["--config-dir", folder, f"experiment={new}"], hardware=False)


def next_commands(name: str) -> list[tuple[str, str]]:
    """The three commands that come next, each with what it does."""
    words = "".join(_where()) + f"experiment={name}"
    check = f"sft preflight {words}" if by_name() else f"python train.py {words} preflight.mode=only"
    return [
        (as_called(f"python scripts/preview.py {words}"), "shows what it would learn, token by token"),
        (check, "checks everything, trains nothing"),
        (as_called(f"python train.py {words}"), "trains"),
    ]


def _where() -> list[str]:
    """The flag that has conf/ of the current folder searched, where it is not by itself."""
    return ["--config-dir conf "] if presets.left_aside() else []


class _Leaf:
    """A setting among tables of settings."""

    def __init__(self, key: str, value: Any):
        self.key, self.value = key, value


def _tree_lines(tree: dict[str, Any], comments: dict[str, str], indent: str = "") -> list[str]:
    lines = []
    for name, inner in tree.items():
        if isinstance(inner, _Leaf):
            comment = comments.get(inner.key) or comment_of(inner.key)
            lines += _leaf_lines(f"{indent}{name}:", inner, comment)
        else:
            lines += [f"{indent}{name}:", *_tree_lines(inner, comments, indent + "  ")]
    return lines


def _leaf_lines(start: str, leaf: _Leaf, comment: str) -> list[str]:
    """A setting with its comment: behind it, or above it where the line would be long."""
    value = jsonable(leaf.value)
    text = yaml.safe_dump(escaped(value), default_flow_style=True, allow_unicode=True, width=10**9)
    text = text.removesuffix("...\n").strip()
    line = f"{start} {json.dumps(escaped(value), ensure_ascii=False) if chr(10) in text else text}"
    comment = _on_a_line(comment)
    if len(line) + len(comment) + 4 <= WIDTH or not comment:
        return [_commented(line, comment)]
    return [" " * (len(start) - len(start.lstrip())) + f"# {comment}", line]


def _on_a_line(text: str) -> str:
    """A comment that holds names of somebody else's: in a line of its own they would be settings."""
    return " ".join(shown(text).split())


def _commented(line: str, comment: str) -> str:
    return f"{line:<38}  # {comment}" if comment else line


def comment_of(key: str) -> str:
    """What a setting is: words for a beginner, or the first sentence of its docstring, or as much as fits on a line."""
    if key in COMMENTS:
        return COMMENTS[key]
    cls, name = find_field(key)
    text = field_docs(cls).get(name, "") if cls else ""
    sentence = re.split(r"(?<=\w\w[.;)]) ", text.replace("`", ""))[0].rstrip(" .;:")
    return sentence if len(sentence) < 90 else sentence[:87].rpartition(" ")[0].rstrip(",;:") + " ..."


def _free(name: str) -> str:
    return next(free for n in range(2, 1000) if not Path("conf", "experiment", f"{(free := f'{name}_{n}')}.yaml").exists())
