"""A sweep's own W&B run: the leaderboard as a table, beside the runs of its jobs and in their group."""

import logging
from pathlib import Path
from typing import Any

from sft.config.schema import Settings
from sft.config.tracking_rules import trackers_of
from sft.sweep.leaderboard import Leaderboard, columns_of, read_leaderboard, write_csv
from sft.tracking.wandb import UPLOAD_SECONDS, choose_mode, place, wandb_settings

log = logging.getLogger(__name__)


def track_summary(folder: Path, settings: Settings) -> None:
    """Write the leaderboard to W&B, as the run `sweep-<folder>`; nothing happens with another tracker, or none.

    A repeated command resumes that run where W&B can be reached; where it then cannot, the run is an offline one. What goes
    wrong in the tracker ends nothing.
    """
    if "wandb" not in trackers_of(settings.tracking):
        return
    try:
        mode = choose_mode(settings.tracking.mode)[0]
        if mode == "disabled":
            return
        try:
            _write_summary(folder, settings, mode)
        except Exception:
            if mode != "online":
                raise
            _write_summary(folder, settings, "offline")
    except Exception as error:  # whatever goes wrong in the tracker, the sweep is done and its folder has everything
        log.warning("W&B could not take the leaderboard (%s); it is in %s.", error, folder / "leaderboard.csv")


def _write_summary(folder: Path, settings: Settings, mode: str) -> None:
    import wandb

    entity, project = place(settings.tracking)
    board = read_leaderboard(folder)
    columns, rows = make_table(board)
    own = wandb_settings()
    run = wandb.init(
        id=f"sweep-{folder.name}"[:128],
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=folder,
        project=project,
        entity=entity,
        name=f"sweep {folder.name}",
        group=settings.tracking.group or own.run_group or folder.name,
        job_type="sweep",
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=60, finish_timeout=UPLOAD_SECONDS),
    )
    run.log({"leaderboard": wandb.Table(columns=columns, data=rows)})
    best = board.best
    facts = {"jobs": len(rows), f"best_{board.method.metric}": best.metric if best else None, "noise": board.noise}
    run.summary.update({**facts, "best_job": best.job.folder if best else None, "remarks": "\n".join(board.remarks)})
    run.finish()


def make_table(board: Leaderboard) -> tuple[list[str], list[list[Any]]]:
    """The leaderboard as columns and rows; values of one column are all numbers or all texts, as W&B needs them."""
    results = columns_of(board.method)
    columns = ["rank", *board.keys, *(name for name, _ in results)]
    texts = {key for key in board.keys if any(isinstance(row.values[key], str) for row in board.rows)}
    rows = [
        [
            row.rank,
            *(str(row.values[key]) if key in texts else row.values[key] for key in board.keys),
            *(get(row) for _, get in results),
        ]
        for row in board.rows
    ]
    return columns, rows


def refresh(folder: Path) -> None:
    """Rewrite leaderboard.csv and the report. What goes wrong here is logged and ends nothing."""
    try:
        board = read_leaderboard(folder)
        write_csv(board)
    except Exception as error:  # a table that cannot be drawn must not cost a night of training
        log.warning("The leaderboard could not be written: %s", error)
        return
    try:
        from sft.sweep.report import write_sweep_report  # brings a chart engine with it, which only this line needs

        write_sweep_report(board)
    except Exception as error:
        log.warning("The sweep's report could not be drawn (%s); leaderboard.csv has the table.", error)
