"""The sentences of the pages in the language of `report.lang`: English ones stand where they are used, and Chinese ones beside
them in assets/report.zh.json.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from sft.paths import ASSETS

Say = Callable[..., str]
"""`say("Better on {count} of {all} rows.", count=24, all=26)`: the sentence in the language of a page."""


def speaker(lang: str) -> Say:
    """What translates the sentences of a page; one that has no translation stays as it is."""
    known = chinese() if lang == "zh" else {}

    def say(sentence: str, **values: Any) -> str:
        text = known.get(sentence, sentence)
        return text.format(**values) if values else text

    return say


@functools.cache
def chinese() -> dict[str, str]:
    """The Chinese sentence of each English one."""
    return json.loads((ASSETS / "report.zh.json").read_text(encoding="utf-8"))


def language_of(run: dict[str, Any]) -> str:
    """`report.lang` of the run with this run.json; a run without the setting is English."""
    settings = run.get("settings")
    report = settings.get("report") if isinstance(settings, dict) else None
    return "zh" if isinstance(report, dict) and report.get("lang") == "zh" else "en"
