"""What is known before a weight is loaded: written to preflight.json and said in a few lines."""

import logging
from pathlib import Path
from typing import Any

from sft.runtime import write_json
from sft.settings import Settings
from sft.validate import warnings_for

log = logging.getLogger(__name__)


def write_preflight(folder: Path, facts: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Write preflight.json from what data.prepare found, log its gist, and return it."""
    found = {**facts, "warnings": [*warnings_for(settings), *facts["warnings"]]}
    write_json(folder / "preflight.json", found)
    rows, lengths = found["rows"], found["lengths"]["train"]
    held_out = f", {rows['eval']} held out" if rows.get("eval") else ", none held out"
    log.info("Data   %s: %d rows to train on%s", found["source"], rows["train"], held_out)
    log.info(
        "       shape %s, template %s, an answer ends with %s",
        found["shape"],
        found["template"],
        " or ".join(found["stop_tokens"]),
    )
    log.info("       tokens a row: median %d, 90%% under %d, longest %d", lengths["p50"], lengths["p90"], lengths["max"])
    for warning in found["warnings"]:
        log.warning(warning)
    return found
