"""The field's words in code, messages and guides: one word for one concept. And pages that name files which are there."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Old word, as a regular expression; the word that stands for it; what may stay: promised names, and other meanings.
WORDS = [
    (r"learnt", "target tokens, trained on", r"nothing_learnt_at"),
    (r"end[- _]to[- _]end|EndToEnd", "padding-free", r""),
    (r"\bflat\b|flat_|_flat\b|FLAT_", "padding-free", r"tests/integration/test_flat\.py|flat (keys|=)|\*\*flat"),
    (r"\bpasses\b|(rows|each|every|whole|small) pass\b|_a_pass\b", "micro-batches", r"passes (the|each|on|by)\b|it passes"),
    (r"found\.split|split into (passes|micro)|(the|a) split of (a|the|these) (step|run|settings)", "batch plan", r""),
    (r"record(ed|ing)? (pass|step|kernel|length|as a? ?CUDA)|recordings\b|launched (pass|step)", "captured, eager", r""),
    (r"computed? (once )?again", "recomputed", r""),
    (r"with_looks|_looks\b|\blooks\.py", "evaluation schedule", r""),
    (r"bad[ _]steps?", "non-finite steps", r"max_bad_steps|[\"`]bad_steps[\"`]"),
    (r"smaller[ _]passes", "OOM retry", r""),
    (r"held against|holds? [^.]* against", "compared with", r""),
    (r"near[ -]ties?\b", "tie", r""),
    (r"\bpartings?\b", "divergence", r"[\"`]partings(_from_merged)?[\"`]"),
    (
        r"take[ns]? up(?! to)|took up|gone on with|gives? (it|them|memory|the memory) back|given back",
        "restored, freed, resumed",
        r"",
    ),
    (r"\btrust(ed|s)?\b", "consent", r"trust_remote_code|that you trust|trusted network|what is trusted"),
    (r"\borigins\b", "provenance", r""),
    (r"\bembedded\b", "built-in", r""),
]
"""`answer` is the labelled span in the data; what a model generates is a completion (below)."""

GENERATED = ("sft/generation", "sft/training", "sft/report", "sft/cli/chat.py", "sft/export/measure.py", "sft/export/verify.py")
"""Where text is generated or shown; there `answer` may only be the end of a prompt, or a promised key."""

NAMES = {"told", "said", "asked", "take_up", "taken_up", "give_back", "given_back", "looks", "origins", "trust", "trusted"}
"""Identifiers whose words are log, report, request, restore, free, schedule, provenance and consent."""

CODE = sorted((ROOT / "sft").rglob("*.py"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
TEXTS = [*CODE, *(ROOT / "sft/assets").glob("*.j2"), *sorted((ROOT / "conf").rglob("*.yaml")), *PAGES]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("old, word, allowed", WORDS, ids=[word for _, word, _ in WORDS])
def test_an_old_word_is_gone(old, word, allowed):
    found = [
        f"{place(path)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(lines(path), 1)
        if re.search(old, re.sub(allowed, "", line) if allowed else line)
    ]
    assert not found, f"say {word}:\n" + "\n".join(found)


def test_generated_text_is_a_completion():
    prompt, keys = r"(last|an?) answer: the prompt|up to their last answer|the hub", r"\"(ends_)?answers(_equal)?\""
    found = []
    for path in (path for path in CODE if place(path).startswith(GENERATED)):
        allowed = f"{prompt}|{keys}" if path.name == "verify.py" else prompt  # keys of verify.json
        for number, line in enumerate(lines(path), 1):
            if "answer" in re.sub(allowed, "", line):
                found.append(f"{place(path)}:{number}: {line.strip()}")
    assert not found, "say completion:\n" + "\n".join(found)


def test_names_in_the_code_are_the_fields_words():
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            name = name or getattr(node, "name", None)
            if name in NAMES:
                found.append(f"{place(path)}:{node.lineno}: {name}")
    assert found == []


def test_pages_and_comments_name_files_that_are_there():
    texts = [*TEXTS, *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.*")]
    named = r"(?<![\w/.])(?:sft|scripts|tests|benchmarks|hydra_plugins|conf)/[\w/.]+\.(?:py|md|yaml|j2)\b(?!\.)"
    found = {(place(path), name) for path in texts for name in re.findall(named, path.read_text(encoding="utf-8"))}
    gone = {(page, name) for page, name in found if not (ROOT / name).is_file()}
    assert len(found) > 30 and {entry for entry in gone if entry[0] != "benchmarks/LOG.md"} == set(), (
        "the log tells of old ones"
    )


def test_the_design_names_files_of_the_package_that_it_describes():
    package, missing = "", []
    for line in lines(ROOT / "docs/design.md"):
        if heading := re.match(r"\*\*`(?:sft/)?(\w+)/`\*\*", line):
            package = heading.group(1)
        if line.startswith("#") or line.startswith("|"):
            package = ""
        missing += [
            f"{package}/{name}"
            for name in re.findall(r"(?<![/\w])`(\w+\.py)`", line)
            if not any((ROOT / folder / name).is_file() for folder in (f"sft/{package}", "sft", "."))
        ]
    assert missing == []
