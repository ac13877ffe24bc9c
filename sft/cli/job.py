"""One Hydra job: its settings and context, where it runs, and every ending turned into a result."""

import contextlib
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sft.config import naming
from sft.config.compose import PROCESSES, command_text, to_settings
from sft.config.keys import leaf_keys
from sft.config.provenance import provenance_of
from sft.config.rules import check_settings
from sft.config.schema import Isolation, PreflightMode, Settings
from sft.errors import Refusal
from sft.launch import ranks
from sft.launch.endings import check_only, guarded
from sft.runs import resume
from sft.runs.record import Context, RunResult
from sft.sweep.index import without_number


def run_job(config: DictConfig) -> RunResult:
    """Run one Hydra job and turn every ending into a result.

    Nothing is raised: in a sweep Hydra would keep the exception, and with it the model, until the last job is done.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweeping = hydra.mode == RunMode.MULTIRUN
    overrides = tuple(hydra.overrides.task)
    provenance, choices = provenance_of(hydra), naming.options_by_group(hydra.runtime.choices)
    values = (OmegaConf.select(config, key) for key in ("model.name", "dataset.path"))
    names = naming.names_by_group(hydra.runtime.choices, provenance, *values)
    name = naming.job_name(names, without_number(folder.name)) if sweeping else naming.run_name(names, overrides)
    logging = OmegaConf.to_container(hydra.job_logging, resolve=True)
    context = Context(name, command_text(), overrides, naming.tags_of(names), provenance, choices=choices, logging=logging)

    stack = contextlib.ExitStack()

    def start() -> RunResult:
        nonlocal context
        settings = to_settings(config)
        if settings.resume:
            counts = [o.removeprefix(PROCESSES) for o in overrides if o.startswith(PROCESSES)]
            settings, context = _recorded(folder, stack, settings.model.trust_remote_code, *counts[-1:])
            context.logging = logging
        problems = check_settings(settings)
        if problems:
            raise Refusal(problems)
        if settings.preflight.mode == PreflightMode.only:
            return check_only(settings, folder, context)
        if sweeping and settings.sweep.isolation == Isolation.process:
            from sft.launch.isolated import run_apart

            return run_apart(settings, folder, context, hydra.job_logging)
        return ranks.launch(settings, folder, context)

    with stack:
        return guarded(start, folder, context, sweeping)


def _recorded(
    folder: Path, stack: contextlib.ExitStack, consent: bool, processes: str | None = None
) -> tuple[Settings, Context]:
    """Settings and context of the run in `folder`, for `resume=`; until `stack` closes, the run works where it began."""
    settings, record = resume.recorded_run(folder, consent, processes)
    stack.enter_context(resume.working_folder(record, folder))
    named = [record.get(key) or empty for key, empty in (("name", "run"), ("command", ""), ("overrides", ()), ("tags", ()))]
    provenance, choices = dict.fromkeys(leaf_keys(), "run.json"), record.get("choices") or {}
    return settings, Context(named[0], named[1], tuple(named[2]), tuple(named[3]), provenance, choices=choices)
