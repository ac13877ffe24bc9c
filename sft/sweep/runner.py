"""Run the jobs of a sweep: find the earlier sweep, leave out what finished, run the rest, and say how it went.

choose_folder -> plan -> run each job -> leaderboard after each -> summary
"""

import json
import math
import os
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from sft import console
from sft.config import fingerprint
from sft.config.compose import command_text, to_settings
from sft.config.keys import flatten
from sft.config.method import facts_of
from sft.config.schema import Isolation, OnFailure, Settings
from sft.errors import Refusal, refuse
from sft.model import warm_cache
from sft.storage import jsonio
from sft.storage.jsonio import number
from sft.sweep import cluster, exit_codes, leaderboard, publish, summaries
from sft.sweep.checks import sweeper_params
from sft.sweep.grid import compose_job, quoted_choices
from sft.sweep.index import (
    DIVERGED,
    DONE,
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    Job,
    SweepIndex,
    SweepLock,
    find_sweeps,
    identify,
    is_name,
    judge,
    load_index,
    read_run,
    readable_index,
)
from sft.sweep.publish import track_summary

SUBDIR = "${hydra:job.num}_${job_label:${hydra:overrides.task}}"
"""conf/config.yaml's `hydra.sweep.subdir`, in place of which a job's number and what varies name its folder."""

LEAVE_OUT = "leave hydra.sweep.subdir out   for the job's number and what varies"


class Sweep:
    """The sweep that one command runs, in this process or on the cluster that `make_cluster(sweep)` gives."""

    def __init__(
        self,
        hydra_context: Any,
        task_function: Any,
        config: DictConfig,
        make_cluster: Callable[["Sweep"], cluster.Cluster] | None = None,
    ):
        self.loader, self.context, self.task, self.config = hydra_context.config_loader, hydra_context, task_function, config
        self.settings = _settings_of(config)
        swept = _swept(config)
        self.swept = sorted({override.key_or_group for override in swept})
        self.quoted = quoted_choices(swept)
        identity = identify(self.settings, self.swept)
        self.lock = _choose_folder(config, identity)
        self.folder = self.lock.folder
        config.hydra.sweep.dir = str(self.folder)
        try:
            self.index = load_index(self.folder) or SweepIndex(self.folder, identity, created_at=jsonio.now())
        except Refusal as refusal:
            _exit_with(refusal)
        self.composed: dict[int, bytes] = {}
        self.planned: list[Job] = []
        self.index.command = command_text()
        self.index.reconcile()
        os.environ.setdefault("WANDB_RUN_GROUP", self.folder.name)
        self.cluster = make_cluster(self) if make_cluster else None
        summaries.append(self.summarise)

    def launch(self, batch: list[list[str]]) -> list[JobReturn]:
        """Run the jobs of `batch` that are not done; (overrides of each job) -> (result of each job)."""
        setup_globals()
        batch = [[self.quoted.get(override, override) for override in overrides] for overrides in batch]
        planned = self._plan(batch)
        jobs = _unique(planned)
        self.planned = _unique([*self.planned, *jobs])
        todo = [job for job in jobs if job.status not in DONE]
        self.index.save()
        _say(f"Sweep  {_short(self.folder)}: {len(jobs)} jobs, {len(jobs) - len(todo)} done before, {len(todo)} to run")
        good = self._run_here(todo) if self.cluster is None else self._run_elsewhere(todo, batch, planned)
        exit_codes.extend(1 for job in jobs if job.status == DIVERGED)
        if not good:
            _say("Sweep  stopped after a failure (sweep.on_failure=stop); repeat the command to go on.")
            raise SystemExit(max(exit_codes, default=1))
        return [_result(job, self.folder) for job in planned]

    def summarise(self) -> None:
        """Print and track the table, when all is over."""
        counts = Counter(job.status for job in self.planned)
        if not counts:
            return
        publish.refresh(self.folder)
        leaderboard.show(self.folder)
        _say(f"Sweep  {', '.join(f'{count} {status}' for status, count in counts.items())}")
        track_summary(self.folder, self.settings)
        for name in ("leaderboard.csv", "report.html"):
            if (self.folder / name).is_file():
                _say(f"       {_short(self.folder / name)}")

    def _plan(self, batch: list[list[str]]) -> list[Job]:
        """The index's job for each member of the batch; equal settings are one job."""
        preset = preset_values(self.loader, self.config)
        by_key = [_overrides_by_key(overrides) for overrides in batch]
        keys = dict.fromkeys(key for overrides in by_key for key in overrides)
        varying = [k for k in keys if k in self.swept or len({overrides.get(k) for overrides in by_key}) > 1]
        planned, composed = [], {}

        def make(overrides: list[str]) -> DictConfig:
            return self.loader.load_sweep_config(self.config, overrides)

        for overrides, shown in zip(batch, by_key, strict=True):
            config = compose_job(make, overrides, composed)
            settings = _settings_of(config)
            folder = self._folder_of(config, fingerprint.config_hash(settings))
            job = self.index.add(settings, {**preset, **shown}, varying, folder)
            planned.append(job)
            if self.cluster is None:  # elsewhere they are composed anew
                self.composed.setdefault(job.number, pickle.dumps(config))  # a tenth of a config's size, and made in no time
        return planned

    def _folder_of(self, config: DictConfig, config_hash: str) -> str | None:
        """The name that a `hydra.sweep.subdir` of one's own gives a job's folder; None where the sweep names it.

        Ends the command with 2 where that is no name, or another job's.
        """
        subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]
        if subdir == SUBDIR or self.index.find(config_hash):  # a job keeps its folder
            return None
        config = pickle.loads(pickle.dumps(config))  # HydraConfig makes it read-only
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = self.index.next_number()
        filled, before = HydraConfig.instance(), HydraConfig.instance().cfg
        filled.set_config(config)
        try:
            name = str(config.hydra.sweep.subdir)
        finally:
            filled.cfg = before
        what, plain = f"hydra.sweep.subdir={subdir}", re.sub(r"[/\\\0]+", "_", subdir)
        other = next((job for job in self.index.jobs if job.folder == name), None)
        if not is_name(name):
            fix = f"'hydra.sweep.subdir={plain}'" if plain != subdir else LEAVE_OUT
            _exit_with(refuse(what, f"A job's folder is one name inside the sweep's, and {name!r} is none.", fix))
        if other:
            values = ", ".join(f"{key}={value}" for key, value in other.overrides.items() if key in self.swept)
            why = f"Two jobs would share the folder {name}: the other has {values or 'other settings'}."
            _exit_with(refuse(what, why, f"'hydra.sweep.subdir={subdir}_${{hydra:job.num}}'\n{LEAVE_OUT}"))
        return name

    def _run_here(self, todo: list[Job]) -> bool:
        """The jobs one after the other in this process; False if a failure ended that."""
        warm_cache.keep(self.settings.sweep.isolation == Isolation.shared)
        try:
            for position, job in enumerate(todo, 1):
                again = f"  (attempt {job.attempts + 1})" if job.attempts else ""
                _say(f"Job    {position}/{len(todo)}  {job.folder}{again}")
                self._run(job)
                if self._ends_sweep(job):
                    return False
        finally:
            warm_cache.keep(False)
        return True

    def _run_elsewhere(self, todo: list[Job], batch: list[list[str]], planned: list[Job]) -> bool:
        """All jobs at once through the cluster; False if a failure ended that."""
        stopped = []

        def changed(job: Job) -> bool:
            self.index.save()
            publish.refresh(self.folder)
            reason = f": {job.reason}" if job.reason else ""
            _say(f"Job    {job.folder} {job.status}{reason}")
            if job.place is None:
                exit_codes.append(cluster.exit_code(job))
            stopped.extend([job] if self._ends_sweep(job) else [])
            return not stopped

        try:
            overrides = {job.number: words for job, words in zip(planned, batch, strict=True)}
            places = cluster.hand_over(self.cluster, todo, overrides, self.folder)
        except Refusal as refusal:
            self.planned.clear()  # there is nothing to summarise
            _exit_with(refusal)
        for place, job in places.items():
            _say(f"Job    {job.folder}  ({self.cluster.name} {place})")
        self.index.save()
        cluster.watch(self.cluster, places, self.folder, changed)
        return not stopped

    def _ends_sweep(self, job: Job) -> bool:
        return job.status in (FAILED, DIVERGED) and self.settings.sweep.on_failure == OnFailure.stop

    def _run(self, job: Job) -> None:
        """One job through Hydra's own run_job, which writes `.hydra`, sets up the log, and calls the task."""
        config = pickle.loads(self.composed.pop(job.number))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = job.number
            config.hydra.sweep.dir, config.hydra.sweep.subdir = str(self.folder), job.folder
        job.status, job.reason, job.attempts = RUNNING, None, job.attempts + 1
        self.index.save()
        start = time.monotonic()
        try:
            run_job(self.task, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
        finally:
            job.seconds = round(job.seconds + time.monotonic() - start, 2)
            job.status, job.reason = _ending(self.folder / job.folder)
            self.index.save()
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)  # closes the job's train.log
            if job.status != FINISHED:
                _say(f"       {job.folder} {job.status}: {job.reason}")
            publish.refresh(self.folder)


# -------------------------------------------------------------------------------------------------------- the plan


def _choose_folder(config: DictConfig, identity: str) -> SweepLock:
    """The folder named with hydra.sweep.dir; else that of the earlier sweep of this identity; else a new one. Locked.

    Raises Refusal if another process works in the named folder.
    """
    named = any(str(o).startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra)
    folder = Path(str(config.hydra.sweep.dir))
    if named:
        lock = SweepLock(folder)
        if not lock.take():
            why = f"Another process ({lock.owner()}) runs this sweep."
            _exit_with(refuse(f"hydra.sweep.dir={folder}", why, "wait for it, or leave hydra.sweep.dir out for a new folder"))
        return lock
    for earlier in find_sweeps(folder.parent):
        index = readable_index(earlier)
        if index and index.identity == identity:
            lock = SweepLock(earlier)
            if lock.take():
                return lock
            _say(f"Sweep  {_short(earlier)} is being run by process {lock.owner()}; this one gets a folder of its own.")
    number = 1
    while not (lock := SweepLock(folder if number == 1 else folder.with_name(f"{folder.name}_{number}"))).take():
        number += 1
    return lock


def preset_values(loader: Any, config: DictConfig) -> dict[str, str]:
    """What the chosen `sweep=` preset sets beside what it sweeps over, as overrides, so that a job can be typed again."""
    found = loader.repository.load_config(f"sweep/{config.hydra.runtime.choices.get('sweep')}")
    content = OmegaConf.to_container(found.config, resolve=False) if found else {}
    settings = flatten({key: value for key, value in content.items() if key not in ("hydra", "sweep")})
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}


def _settings_of(config: DictConfig) -> Settings:
    """The settings of a composed config; what cannot be read ends the command with 2."""
    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        return to_settings(plain)
    except Refusal as refusal:
        _exit_with(refusal)


def _swept(config: DictConfig) -> list[Override]:
    parsed = OverridesParser.create().parse_overrides([*sweeper_params(config.hydra), *config.hydra.overrides.task])
    return [override for override in parsed if override.is_sweep_override()]


def _overrides_by_key(overrides: list[str]) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=")[::2] for override in overrides)
    return {key: value for key, value in pairs if not key.startswith(("hydra.", "hydra/", "sweep.")) and key != "sweep"}


def _unique(jobs: list[Job]) -> list[Job]:
    return list({job.number: job for job in jobs}.values())


# ------------------------------------------------------------------------------------------------------- how it went


def _ending(folder: Path) -> tuple[str, str | None]:
    """(status, reason) of a job that came back, from its run.json."""
    run = read_run(folder)
    return judge(run) if run else (STOPPED, "interrupted before training")


def _result(job: Job, folder: Path) -> JobReturn:
    """What a sweeper gets to see: what the method ranks runs by, infinitely bad if it diverged. Without the configs, which it
    would keep."""
    run = read_run(folder / job.folder) if job.status in (FINISHED, DIVERGED) else {}
    method = facts_of(run)
    value = number(run.get("metrics", {}).get(method.metric))
    result = JobReturn(overrides=[f"{k}={v}" for k, v in job.overrides.items()], status=JobStatus.COMPLETED)
    result.return_value = (-math.inf if method.greater_is_better else math.inf) if job.status == DIVERGED else value
    return result


def _exit_with(refusal: Refusal) -> NoReturn:
    console.say_refusal(refusal)
    raise SystemExit(2)


def _say(text: str) -> None:
    console.say(text)


def _short(path: Path) -> str:
    return os.path.relpath(path)
