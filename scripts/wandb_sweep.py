"""Write the YAML of a W&B sweep from the command line of a sweep; W&B's agents then run its jobs, on any machine.

    python scripts/wandb_sweep.py -m lora.r=8,16 trainer.learning_rate=1e-4,2e-4 > sweep.yaml     every combination
    python scripts/wandb_sweep.py method=random -m lora.r=8,16,32 seed=1,2,3 > sweep.yaml         drawn at random
    python scripts/wandb_sweep.py sweep=tpe dataset=alpaca_zh > sweep.yaml                        a search: W&B's bayes
    wandb sweep sweep.yaml                                                                        says how to start agents

Takes what `python train.py -m` takes, and `method=grid|random|bayes`. The agents start train.py, so they run in this folder.
"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from sft.cli.check import check_command_line
from sft.cli.overrides import parse_overrides
from sft.config.compose import to_settings
from sft.config.method import facts_of
from sft.config.schema import TrackingSettings
from sft.config.tracking_rules import trackers_of
from sft.errors import Refusal, refuse
from sft.storage.jsonio import jsonable
from sft.sweep.grid import list_values
from sft.tracking.names import name_metric
from sft.tracking.wandb import place

METHODS = ("grid", "random", "bayes")

AGENT = "tracking=wandb_agent"


def main(argv: list[str]) -> int:
    """Print the YAML of the sweep that `argv` describes; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        text = yaml.safe_dump(make_sweep(argv), sort_keys=False, allow_unicode=True, width=1000)
        print("# wandb sweep sweep.yaml   and then what it says, on each machine: wandb agent <entity>/<project>/<id>")
        print(text, end="")
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


def make_sweep(argv: list[str]) -> dict[str, Any]:
    """The W&B sweep that does what `train.py` does with these words. Raises Refusal."""
    methods = [word.partition("=")[2] for word in argv if word.startswith("method=")]
    words = [word for word in argv if not word.startswith("method=")]
    if any(method not in METHODS for method in methods):
        raise refuse(f"method={methods[0]}", "W&B knows no such method.", "   or   ".join(f"method={m}" for m in METHODS))
    check_command_line(ROOT / "conf", words, hardware=False)
    args = get_args_parser().parse_args(words)
    flags = [text for flag, value in (("--config-dir", args.config_dir), ("--config-name", args.config_name)) if value
             for text in (flag, value)]  # fmt: skip
    search = [f"hydra.searchpath=[file://{Path(args.config_dir).resolve()}]"] if args.config_dir else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        typed = parse_overrides(args.overrides, [])
        fixed = [override for override in typed if not override.is_sweep_override()]
        lines = [override.input_line for override in fixed]
        composed = compose(args.config_name or "config", overrides=search + lines, return_hydra_config=True)
        preset = [f"{key}={value}" for key, value in (composed.hydra.sweeper.get("params") or {}).items()]
        known = {override.key_or_group for override in typed}
        swept = [o for o in parse_overrides(preset, []) if o.key_or_group not in known]
        swept += [override for override in typed if override.is_sweep_override()]
        hydra = composed.hydra
    settings = to_settings(_without_hydra(composed))
    if not swept:
        raise refuse(" ".join(words) or "no word", "No setting has several values.", "-m lora.r=8,16   or   sweep=tpe")
    if settings.sweep.paired:
        why = "W&B tries every combination, and cannot keep the values of two settings together."
        fix = "sweep.paired=[]   for every combination   or   python train.py -m ...   without W&B's agents"
        raise refuse("sweep.paired", why, fix)
    if "wandb" not in trackers_of(settings.tracking):
        what = f"tracking={settings.tracking.tracker.value}"
        raise refuse(what, "W&B does not hear of jobs that are not tracked there.", "tracking=wandb")
    ranked = facts_of({"settings": jsonable(settings)})
    method, trials = _method(hydra)
    method = methods[-1] if methods else method
    if method == "grid" and any(override.is_interval_sweep() for override in swept):
        raise refuse("method=grid", "A grid cannot try every value of an interval.", "method=bayes   or   method=random")
    return {
        "program": "train.py",
        "method": method,
        "metric": {"name": name_metric(ranked.metric), "goal": "maximize" if ranked.greater_is_better else "minimize"},
        **_account(settings.tracking),
        **({"run_cap": trials} if trials and method != "grid" else {}),
        "parameters": {override.get_key_element(): _values(override) for override in swept},
        "command": ["${env}", "${interpreter}", "${program}", *flags, *_words(fixed, hydra), "${args_no_hyphens}"],
    }


def _without_hydra(config: DictConfig) -> DictConfig:
    return DictConfig({key: value for key, value in config.items_ex(resolve=False) if key != "hydra"})


def _method(hydra: DictConfig) -> tuple[str, int | None]:
    """(W&B's method, the number of jobs) of what `sweep=` chose."""
    sampler = hydra.sweeper.get("sampler")
    if sampler is None:
        return "grid", None
    return "random" if "Random" in str(sampler.get("_target_")) else "bayes", hydra.sweeper.get("n_trials")


def _account(tracking: TrackingSettings) -> dict[str, str]:
    """Where the sweep and its runs belong: W&B has one place for all of them, and an agent's run takes it from there."""
    entity, project = place(tracking)
    return {"project": project, **({"entity": entity} if entity else {})}


def _words(fixed: list[Override], hydra: DictConfig) -> list[str]:
    """What each job has in common, without what only a sweep of Hydra's needs."""
    left_out = ("hydra.sweep", "hydra.launcher", "hydra/", "tracking.project", "tracking.entity", "tracking.mode")
    words = [override.input_line for override in fixed if not override.key_or_group.startswith(left_out)]
    words += ["hydra.mode=RUN"] if hydra.mode == RunMode.MULTIRUN else []
    words = [word for word in words if word not in ("tracking=wandb", AGENT)]
    return words if any(word.startswith("tracking=") for word in words) else [*words, AGENT]


def _values(override: Override) -> dict[str, Any]:
    """The values of one setting in W&B's words."""
    if not override.is_interval_sweep():
        return {"values": [_plain(text) for text in list_values(override)]}
    interval = override.value()
    whole = isinstance(interval.start, int) and isinstance(interval.end, int)
    kind = "log_uniform_values" if "log" in interval.tags else "int_uniform" if whole else "uniform"
    return {"distribution": kind, "min": interval.start, "max": interval.end}


def _plain(text: str) -> Any:
    """A number or truth value as one, so that W&B can draw it; any other text as it would be typed."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
