"""python -m sft.export RUN_FOLDER: the exports that run.json asks for, in a process of their own, at the end of a run.

Before the folder stands model.trust_remote_code=true where the run was allowed it.
A fresh process gives the training's memory back, is free of what Unsloth patched into the libraries, and survives nothing
of the training but its files: what is measured is what was saved.
"""

import logging
import sys
from pathlib import Path

from sft import console, environment
from sft.config.consent import WORD
from sft.export.program import end_with_parent


def main(folder: Path, consent: bool = False) -> int:
    """Export and verify; 1 if an artifact failed, 2 if it was refused."""
    end_with_parent()
    handlers = [console.ConsoleHandler(), console.LogFile(folder / "train.log", encoding="utf-8")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    environment.prepare_environment()
    environment.quiet_libraries()
    from sft.errors import ExportError, Refusal
    from sft.export import exporter
    from sft.runs.saved import settings_of

    try:
        report = exporter.export_run(folder, settings_of(folder, consent)[0])
    except Refusal as refusal:
        console.say(refusal)
        return 2
    except ExportError as error:
        logging.error("%s", error)
        return 1
    return 1 if exporter.failures(report) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1]), WORD in sys.argv))
