"""Each command of the guides is taken as it is written."""

import re
import shlex
from pathlib import Path

from sft.cli.check import check_command_line
from sft.cli.main import training_words
from sft.errors import Refusal
from tests.conftest import ROOT

PROGRAMS = r"python train\.py|python scripts/preview\.py|sft (?:train|sweep|preflight|preview)"
"""What takes the settings of a run."""

FILES = re.compile(r"[\w./-]+\.(?:jsonl|json|csv|parquet|arrow)(?:\.gz)?")

REFUSED = {
    "lora.rr=8": "an example of a refusal",
    "KEY=VALUE": "the form of an override",
    "experiment=my": "a preset that sft init has written",
    "model.name=/data/models/my_model": "a model of the reader's",
}
"""Words by which a command is refused here, with the reason that it stands in a guide."""


def commands() -> dict[str, str]:
    """{command: the page it stands on} of code blocks and of code in a line, without those that hold a placeholder."""
    found = {}
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.S)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in lines:
            command = re.split(r"\s+#\s|\s{3,}", line.strip().removeprefix("$ "))[0]
            if re.match(rf"({PROGRAMS})\b", command) and "..." not in command and "<" not in command:
                found.setdefault(command, page.name)
    return found


def words_of(command: str) -> list[str]:
    """What the command line is given."""
    program, *words = shlex.split(command)
    return training_words(words[0], words[1:]) if program == "sft" and words[0] != "preview" else words[1:]


def test_every_command_of_the_guides_is_taken(tmp_path, monkeypatch):
    """As if it were typed on a machine with a GPU, in a folder with the files and the preset that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/faq.yaml").write_text("# @package _global_\n", encoding="utf-8")  # as sft init would
    known, wrong = commands(), []
    assert len(known) > 100
    for command, page in known.items():
        words = words_of(command)
        for name in (
            name for word in words if word.startswith(("dataset.path", "dataset.eval_path")) for name in FILES.findall(word)
        ):
            if not name.startswith("/"):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
        try:
            check_command_line(ROOT / "conf", words, hardware=False)
        except Refusal as refusal:
            if not {*words} & {*REFUSED}:
                wrong.append(f"{page}: {command}\n{refusal}")
    assert not wrong, "\n".join(wrong)
    used = {word for command in known for word in words_of(command)}
    assert {*REFUSED} <= used
