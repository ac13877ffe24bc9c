"""Export a trained run, prove that each export generates what the trained model does, and push it to the hub if wanted.

    python scripts/export.py run=outputs/<run> export=gguf
    python scripts/export.py run=outputs/<run> export.formats=[merged_16bit,gguf] export.gguf.quantizations=[f16,q4_k_m]
    python scripts/export.py run=outputs/<run>/checkpoints/checkpoint-30 export=merged_16bit
    python scripts/export.py run=outputs/<run> export=all export.hub.repo=me/my-model
    python scripts/export.py run=outputs/<run> push=true export.hub.repo=me/my-model      what is exported already

Takes run= and the overrides of the export group; model.name=<folder> where the model that was trained on is elsewhere now;
model.trust_remote_code=true for a run that was trained with it.
Exit codes: 0 all hold, 1 one failed, 2 refused.
"""

import logging
import shlex
from pathlib import Path

from sft import console, environment
from sft.cli.check import read_settings
from sft.cli.target import find_run
from sft.config.consent import WORD, with_word
from sft.config.schema import Settings
from sft.errors import ExportError, Problem, Refusal
from sft.paths import CONF
from sft.programs import as_called
from sft.runs.saved import settings_of

OWN = ("run", "push", "model.name")


@console.takes_json
def main(argv: list[str]) -> int:
    """Export what `argv` describes; returns the exit code."""
    if {"-h", "--help"} & set(argv) or not argv:
        print(as_called(__doc__))
        return 0
    try:
        folder, weights, settings, push = read_request(argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console.ConsoleHandler()])
        environment.prepare_environment()
        environment.quiet_libraries()
        from sft.export import exporter

        report = exporter.push_run(folder, settings) if push else exporter.export_run(folder, settings, weights)
        _renew_report(folder)
    except Refusal as refusal:
        console.say_refusal(refusal)
        return 2
    except ExportError as error:
        console.say(f"Failed: {error}")
        return 1
    failures = exporter.failures(report)
    for line in failures:
        console.say(f"Failed: {line}")
    return 1 if failures else 0


def read_request(argv: list[str]) -> tuple[Path, Path | None, Settings, bool]:
    """(run folder, checkpoint or None, the run's settings with the export's in place, whether only to push).

    Raises Refusal for every mistake that can be known before a weight is read.
    """
    own = dict(a.split("=", 1) for a in argv if a.split("=", 1)[0] in OWN and "=" in a)
    others = [a for a in argv if a.split("=", 1)[0] not in OWN and a != WORD]
    problems = [
        Problem(
            a, "An export takes run=, push=, model.name= and the settings of the export group.", "export=gguf   for example"
        )
        for a in others
        if not a.lstrip("+").startswith(("export=", "export."))
    ]
    if "run" not in own:
        problems.append(Problem(" ".join(argv), "It names no run.", "run=outputs/<run>"))
    if problems:
        raise Refusal(problems)
    push = own.get("push", "false").lower() in ("true", "1", "yes")
    named = any(word.lstrip("+").startswith(("export=", "export.formats=")) for word in others)
    # A repository without a format is refused where something is made; a push without one takes what there is.
    wanted = read_settings(CONF, [*(["export=adapter"] if push and not named else []), *others], hardware=False).export
    wanted.formats = wanted.formats if named else []
    folder, weights = find_run(own["run"])
    settings, record = settings_of(folder, WORD in argv, own.get("model.name"))
    settings.export = wanted
    if weights is not None and weights.parent.name != "checkpoints":
        why = "It is neither a run nor a checkpoint of one."
        problems.append(Problem(f"run={own['run']}", why, shlex.quote(f"run={folder}")))
    if push and not wanted.hub.repo:
        problems.append(Problem("push=true", "It names no repository.", "export.hub.repo=<user>/<name>"))
    if not push and not wanted.formats:
        fix = "export=merged_16bit   or   export=gguf   or   export=all"
        problems.append(Problem(" ".join(argv), "It names no format.", fix))
    if not settings.lora.enabled and "adapter" in wanted.formats:
        problems.append(Problem("export.formats: adapter", "This run trained the whole model.", "export=merged_16bit"))
    if weights is None and not (folder / ("adapter" if settings.lora.enabled else "model")).is_dir():
        fix = (
            with_word(f"python train.py {shlex.quote('resume=' + own['run'])}", settings)
            if record.get("status") != "finished"
            else "train it again"
        )
        problems.append(Problem(f"run={own['run']}", f"Its weights are not there (status {record.get('status')}).", fix))
    if problems:
        raise Refusal(problems)
    return folder, weights, settings, push


def _renew_report(folder: Path) -> None:
    """Put the verification into report.html; a report that cannot be drawn fails no export."""
    try:
        from sft.report.page import write_report

        write_report(folder)
    except Exception as error:
        logging.warning("The report could not be written: %s", error)
