"""The way in from Python: `from sft import compose, run`.

from sft import compose, run

settings = compose("model=tiny_random", "dataset=local", "dataset.path=rows.jsonl", "lora.r=8")
result = run(settings, "outputs/first")
print(result.status, result.metric, result.folder)
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sft.cli.check import read_settings
from sft.config.rules import check_settings
from sft.config.schema import PreflightMode, Settings
from sft.errors import Refusal, refuse
from sft.paths import CONF
from sft.runs.record import Context, RunResult


def compose(*words: str) -> Settings:
    """The settings that these words give, as `python train.py` would compose them: `compose("model=llama3_8b", "lora.r=8")`.

    Options, overrides and `--config-dir` are taken; a `conf/` folder in the working directory is found and comes first.
    `resume=<run folder>` alone gives the settings of that run. Takes about a second; nothing heavy is imported.

    Raises:
        Refusal: with every problem of the words and the settings in it, each with the override that mends it.
    """
    return read_settings(CONF, list(words))


def run(settings: Settings, folder: str | Path | None = None) -> RunResult:
    """Train `settings` into `folder`, with the checks, exports and report of a run of the command line.

    Without a folder it is `outputs/<time>_<model>_<data>`. A folder that holds the same run, cut or stopped, is resumed.
    What happened is in the result: `status` (`finished`, `stopped`, `failed`; `checked` with `preflight.mode=only`),
    `exit_code`, `folder`, and `metric`, the held-out value that the method ranks runs by. What a run says goes to its
    train.log, and to the handlers of the logger `sft`.

    Raises:
        Refusal: before training, with every problem in it; the folder stays as it was.
    """
    if problems := check_settings(settings):
        raise Refusal(problems)
    if settings.preflight.mode == PreflightMode.only and folder is not None and Path(folder).exists():
        raise refuse(f"folder={folder}", "A check leaves no folder behind, and this one is there.", "leave the folder out")
    from sft.launch.endings import check_only
    from sft.launch.ranks import launch
    from sft.model import warm_cache

    place = (Path(folder) if folder is not None else _new_folder(settings)).absolute()
    made = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    context = Context(name=place.name)
    try:
        with _logged(place):
            if settings.preflight.mode == PreflightMode.only:
                return check_only(settings, place, context)
            return launch(settings, place, context)
    except BaseException:
        if made and not (place / "run.json").exists():
            for name in ("train.log", "preflight.json"):
                (place / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds more than that
                place.rmdir()
        raise
    finally:
        warm_cache.release()


def _new_folder(settings: Settings) -> Path:
    """`outputs/<time>_<model>_<data>`, as train.py calls it."""
    data = settings.dataset.path if isinstance(settings.dataset.path, str) else settings.dataset.name
    words = [Path(settings.model.name).name, Path(str(data or "rows")).stem]
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path("outputs") / "_".join([stamp, *(re.sub(r"[^\w.-]+", "-", word) for word in words)])


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Write what a run says to its train.log, as Hydra's logging does for the command line."""
    logger, handler = logging.getLogger("sft"), logging.FileHandler(folder / "train.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(before, logging.INFO) if before else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
