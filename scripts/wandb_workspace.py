"""Make a W&B workspace for a sweep: curves, parallel coordinates, learning rate against loss, and the sample table.

    pip install -e ".[workspace]"
    python scripts/wandb_workspace.py                                the newest sweep in outputs/sweeps
    python scripts/wandb_workspace.py run=outputs/sweeps/<stamp>
    python scripts/wandb_workspace.py --dry-run                      print the definition, ask nothing of the network

Needs a W&B account that can be reached, and the sweep's runs uploaded (wandb sync).
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from sft.config.schema import GROUPS, TrackingSettings
from sft.errors import Refusal, refuse
from sft.sweep.index import find_sweeps, read_run, readable_index
from sft.sweep.leaderboard import Leaderboard, read_leaderboard
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
            raise refuse("outputs/sweeps", "There is no sweep here yet.", "python train.py -m lora.r=8,16")
        board = read_leaderboard(named[0])
        dry = "--dry-run" in argv
        if not (dry or has_api_key()):
            raise refuse("scripts/wandb_workspace.py", "W&B has no key here.", "wandb login\n--dry-run   prints the definition")
        workspace = define(board, *tracked_at(board))
        if dry:
            print(json.dumps(workspace._to_model().model_dump(by_alias=True, mode="json"), indent=2))
        else:
            print(workspace.save().url)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


def tracked_at(board: Leaderboard) -> tuple[str, str]:
    """(entity, project) that the sweep's runs were tracked with, from their settings."""
    for row in board.rows:
        run = read_run(board.index.folder / row.job.folder)
        settings = run.get("settings")
        tracking = settings.get("tracking") if isinstance(settings, dict) else None
        if isinstance(tracking, dict):
            named = TrackingSettings(entity=tracking.get("entity"), project=tracking.get("project"))
            entity, project = place(named, run.get("tracking"))
            return str(entity or ""), str(project)
    raise refuse(str(board.index.folder), "None of its jobs has begun, so its W&B project is not known.", "run the sweep first")


def define(board: Leaderboard, entity: str, project: str) -> Any:
    """The workspace as an object of wandb-workspaces, of the sweep's group alone. Raises Refusal without the package."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces.expr import And
    except ImportError as error:
        raise refuse(
            "scripts/wandb_workspace.py", "wandb-workspaces is not installed.", 'pip install -e ".[workspace]"'
        ) from error
    loss = reports.SummaryMetric("eval_loss")
    settings = [reports.Config(f"{key}.name" if key in GROUPS else key) for key in board.keys]
    columns = [reports.ParallelCoordinatesPlotColumn(metric=metric) for metric in [*settings, loss]]
    curves = [reports.LinePlot(title=title, x="step", y=[key]) for title, key in
              (("Held-out loss", "eval_loss"), ("Training loss", "loss"), ("Learning rate", "learning_rate"))]  # fmt: skip
    effects = [
        reports.ScatterPlot(title=f"{key} against held-out loss", x=metric, y=loss, log_x=key.endswith("learning_rate") or None)
        for key, metric in zip(board.keys, settings, strict=True)
    ]
    sections = [
        workspaces.Section(name="Curves", panels=curves, is_open=True),
        workspaces.Section(
            name="Settings and loss",
            panels=[reports.ParallelCoordinatesPlot(title="All runs", columns=columns), *effects],
            is_open=True,
        ),
        workspaces.Section(name="Samples", panels=[reports.WeavePanelSummaryTable(table_name="samples")], is_open=True),
    ]
    group = And(workspaces.Metric("Group") == board.index.folder.resolve().name)
    only_this = workspaces.RunsetSettings(filters=group)
    name = f"sweep {board.index.folder.resolve().name}"
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=only_this)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
