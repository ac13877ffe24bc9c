"""Make a W&B workspace for a run or a sweep: curves, what each setting did to the loss, and the sample table.

    pip install -e ".[workspace]"
    python scripts/wandb_workspace.py                                the newest sweep in outputs/sweeps
    python scripts/wandb_workspace.py run=outputs/sweeps/<stamp>     a sweep, its jobs sorted by what ranks them
    python scripts/wandb_workspace.py run=outputs/<run>              a single run
    python scripts/wandb_workspace.py --dry-run                      print the definition, ask nothing of the network

Needs a W&B account that can be reached, and the runs uploaded (wandb sync).
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from sft.config.method import GRPO, MethodFacts, facts_of
from sft.config.schema import GROUPS, TrackingSettings
from sft.errors import Refusal, refuse
from sft.runs.resume import read_record
from sft.sweep.index import find_sweeps, load_index, readable_index
from sft.sweep.leaderboard import Leaderboard, read_leaderboard
from sft.tracking.names import AXIS, TOKENS, name_metric
from sft.tracking.wandb import has_api_key, place


def main(argv: list[str]) -> int:
    """Make the workspace that `argv` asks for; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        named = [Path(word.partition("=")[2]) for word in argv if word.startswith("run=")]
        named = named or [sweep for sweep in find_sweeps(Path("outputs/sweeps")) if readable_index(sweep)]
        if not named:
            why = "There is no sweep here yet."
            raise refuse("outputs/sweeps", why, "python train.py -m lora.r=8,16\nrun=outputs/<run>   for a single run")
        dry = "--dry-run" in argv
        if not (dry or has_api_key()):
            raise refuse("scripts/wandb_workspace.py", "W&B has no key here.", "wandb login\n--dry-run   prints the definition")
        workspace = define(named[0])
        if dry:
            print(json.dumps(workspace._to_model().model_dump(by_alias=True, mode="json"), indent=2))
        else:
            print(workspace.save().url)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


def define(folder: Path) -> Any:
    """The workspace of the run or sweep in `folder`, as an object of wandb-workspaces. Raises Refusal without the package."""
    try:
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces.expr import And, Metric, Ordering, Summary
    except ImportError as error:
        raise refuse(
            "scripts/wandb_workspace.py", "wandb-workspaces is not installed.", 'pip install -e ".[workspace]"'
        ) from error
    board = read_leaderboard(folder) if load_index(folder) else None
    run = _tracked(folder, [folder / row.job.folder for row in board.rows] if board else [folder])
    tracking = run.get("tracking") or {}
    settings = (run.get("settings") or {}).get("tracking") or {}
    entity, project = place(TrackingSettings(entity=settings.get("entity"), project=settings.get("project")), tracking)
    name, method = folder.resolve().name, facts_of(run)
    if board:
        # The sweep's own run has no curves.
        only = And(Metric("Group") == (tracking.get("group") or name), Metric("JobType") != "sweep")
    else:
        only = And(Metric("ID") == tracking.get("id"))
    best_first = Ordering(Summary(method.metric), ascending=not method.greater_is_better)
    return workspaces.Workspace(
        entity=str(entity or ""),
        project=str(project),
        name=f"{'sweep' if board else 'run'} {name}",
        sections=_sections(workspaces.Section, board, method),
        settings=workspaces.WorkspaceSettings(x_axis=AXIS, max_runs=max(10, len(board.rows) if board else 1)),
        runset_settings=workspaces.RunsetSettings(filters=only, order=[best_first]),
    )


def _tracked(folder: Path, runs: list[Path]) -> dict[str, Any]:
    """The first run.json that says where a run was tracked."""
    records = [read_record(path) or {} for path in runs]
    begun = [record for record in records if (record.get("tracking") or {}).get("id")]
    planned = [record for record in records if isinstance((record.get("settings") or {}).get("tracking"), dict)]
    if begun or (planned and load_index(folder)):
        return [*begun, *planned][0]
    raise refuse(str(folder), "No W&B run was begun there, so its project is not known.", "run it first, with tracking=wandb")


def _sections(section: Any, board: Leaderboard | None, method: MethodFacts) -> list[Any]:
    """The panels: curves by step and by tokens, for a sweep what its settings did, speed, samples."""
    import wandb_workspaces.reports.v2 as reports

    ranked, title = name_metric(method.metric), method.title.capitalize()
    curves = [
        reports.LinePlot(title=title, x=AXIS, y=[ranked]),
        reports.LinePlot(title=f"{title} by tokens", x=TOKENS, y=[ranked]),
        reports.LinePlot(title=f"Training {method.noun}", x=AXIS, y=[name_metric(method.noun)]),
        reports.LinePlot(title="Learning rate", x=AXIS, y=[name_metric("learning_rate")]),
        reports.LinePlot(title="Completions ended by EOS", x=AXIS, y=[name_metric("eos_share")]),
    ]
    speed = [reports.LinePlot(title=title, x=AXIS, y=[name_metric(key)]) for title, key in
             (("Tokens per second", "tokens_per_second"), ("Memory, GiB", "memory_gib"))]  # fmt: skip
    made = [section(name="Curves", panels=curves, is_open=True)]
    if board:
        loss = reports.SummaryMetric(method.metric)  # of the weights that were kept
        settings = [reports.Config(f"choices.{key}" if key in GROUPS else key) for key in board.keys]
        columns = [reports.ParallelCoordinatesPlotColumn(metric=metric) for metric in [*settings, loss]]
        effects = [
            reports.ScatterPlot(
                title=f"{key} against {method.title}", x=metric, y=loss, log_x=key.endswith("learning_rate") or None
            )
            for key, metric in zip(board.keys, settings, strict=True)
        ]
        all_runs = reports.ParallelCoordinatesPlot(title="All runs", columns=columns)
        importance = reports.ParameterImportancePlot(with_respect_to=method.metric)
        made.append(section(name=f"Settings and {method.noun}", panels=[all_runs, *effects, importance], is_open=True))
    tables = ["samples", *(["rollouts"] if method is GRPO else [])]
    shown = [reports.WeavePanelSummaryTable(table_name=name) for name in tables]
    return [*made, section(name="Speed", panels=speed), section(name="Samples", panels=shown, is_open=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
