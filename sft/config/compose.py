"""From Hydra's config to Settings, and from recorded values back to them. The command's own words, for the record."""

import functools
import os
import pickle
import re
import shlex
import sys
import warnings
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from sft.config import naming
from sft.config.keys import find_field, leaf_keys, plain_type, stray_keys, unknown_key
from sft.config.presets import OwnPresets
from sft.config.schema import BUILT_IN, Settings
from sft.errors import Problem, Refusal, first_line, refuse
from sft.programs import as_called, by_name

SECRET_NAME = re.compile(r"SECRET|PASSW|APIKEY|CREDENTIAL|TOKEN(?![A-Z])|(^|_)KEY(?![A-Z])")
"""Environment variables, in capitals, of which no setting is filled in."""


@functools.cache
def register() -> None:
    """Store the schema for Hydra as `schema` and register the resolvers that the YAML files use, once in a process."""
    Plugins.instance().register(OwnPresets)
    schema = OmegaConf.structured(Settings)
    # Free-form mappings accept new keys without Hydra's `+`: `trainer.extra.neftune_noise_alpha=5`.
    free = (
        schema.trainer.extra,
        schema.lora.extra,
        schema.dataset.keep,
        schema.dataset.drop,
        schema.dataset.chat_template_kwargs,
        schema.method.reward_options,
    )
    for node in free:
        OmegaConf.set_struct(node, False)
    ConfigStore.instance().store("schema", schema)
    # Hydra copies the whole store for every question to it, 90 times for --help alone; it hands out copies anyway.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    # What Hydra takes where nothing is chosen. An `override` in conf/config.yaml would win over that of an experiment.
    hydra = HydraConf()
    hydra.defaults = [{**entry, **{key: "sft" for key in ("sweeper", "launcher") if key in entry}} for entry in hydra.defaults]
    ConfigStore.instance().store("config", hydra, group="hydra", provider="hydra")
    # Hydra takes sweepers and launchers from the package hydra_plugins alone.
    sweeper = {"_target_": "hydra_plugins.sft_sweep.SweepSweeper", "max_batch_size": None, "params": None}
    sweeper |= {"sampler": None, "n_trials": 20, "n_jobs": 1}  # of a search: conf/sweep/tpe.yaml
    ConfigStore.instance().store("sft", sweeper, group="hydra/sweeper")
    ConfigStore.instance().store("sft", {"_target_": "hydra_plugins.sft_sweep.SweepLauncher"}, group="hydra/launcher")
    # conf/hydra/launcher/ has files with the names of the launchers they are for, whose types they are checked against.
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    OmegaConf.register_new_resolver("pick", _pick, replace=True)
    OmegaConf.register_new_resolver("dpo_learning_rate", _dpo_learning_rate, replace=True)
    OmegaConf.register_new_resolver("is_twist_pairs", _is_twist_pairs, replace=True)
    OmegaConf.register_new_resolver("grpo_learning_rate", _grpo_learning_rate, replace=True)
    OmegaConf.register_new_resolver("is_sums", _is_sums, replace=True)
    OmegaConf.register_new_resolver("sums_weights", _sums_weights, replace=True)
    OmegaConf.register_new_resolver("job_label", naming.job_label, replace=True)
    OmegaConf.register_new_resolver("run_words", naming.run_words, replace=True)
    OmegaConf.register_new_resolver("as_called", as_called, replace=True)
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _environment(name: str, *default: Any) -> Any:
    """`${oc.env:NAME}`, but for what is named like a secret: a setting's value is written to the run folder."""
    if SECRET_NAME.search(str(name).upper()):
        why = "It is named like a secret, and a setting's value is written to the run folder and to the log."
        fix = "leave it out: the libraries read HF_TOKEN and WANDB_API_KEY themselves\nrename the variable if it is none"
        raise refuse(f"${{oc.env:{name}}}", why, fix)
    return oc.env(name, *default)


def _pick(condition: bool, if_true: Any, if_false: Any) -> Any:
    """`${pick:${.load_in_4bit},a,b}`: a where the condition holds, else b."""
    return if_true if condition else if_false


def _dpo_learning_rate(model: str) -> float:
    """The rate of method=dpo: that of models of billions, as recipes for LoRA have it, or of the built-in models, as tried."""
    return 2e-4 if model in BUILT_IN else 5e-6


def _is_twist_pairs(dataset: str | None, path: Any, model: str) -> bool:
    """Whether the rows are the shipped pairs, and the model a built-in one."""
    return dataset == "twist_pairs" and path is None and model in BUILT_IN


def _grpo_learning_rate(model: str) -> float:
    """The rate of method=grpo: that of models of billions, or of the built-in models, as tried."""
    return 3e-4 if model in BUILT_IN else 5e-6


def _is_sums(dataset: str | None, path: Any, model: str | None = None) -> bool:
    """Whether the rows are the shipped sums, and the model, where one is given, a built-in one."""
    return dataset == "sums" and path is None and (model is None or model in BUILT_IN)


def _sums_weights(rewards: list[str]) -> list[float]:
    """The weights of the rewards of the shipped sums; those of others are the user's."""
    return [0.8, 0.2] if list(rewards) == ["number", "ends"] else []


PROCESSES = "distributed.num_processes="
"""The one setting that may stand beside `resume=`."""


def to_settings(config: DictConfig) -> Settings:
    """Turn a composed config into plain settings objects. Raises Refusal."""
    return fill_settings(OmegaConf.to_container(config, resolve=True, enum_to_str=True))


def fill_settings(plain: dict[str, Any]) -> Settings:
    """The settings with these values, taken as they are: `${` in a text stays `${`. Raises Refusal.

    Composed values are merged into the schema once more, because Hydra's `+key=value` walks past it.
    """
    if not isinstance(plain, dict):
        raise Refusal([Problem("settings", "They are no table of settings.", "docs/settings.md lists all settings")])
    problems = [unknown_key(path, value) for path, value in stray_keys(plain, Settings)]
    problems += [
        Problem(key, "It is a list of single values, and one of them is a list or a table.", f"{key}=[<value>,<value>]")
        for key in leaf_keys()
        if str(plain_type(*find_field(key))).startswith("list") and _holds_tables(plain, key)
    ]
    problems += [
        Problem(
            key,
            "It is pairs of names and texts, and one of the values is a list or a table.",
            f"'{key}={{<name>: \"<text>\"}}'",
        )
        for key in leaf_keys()
        if str(plain_type(*find_field(key))).startswith("dict[str, str]") and _holds_tables(plain, key)
    ]
    if problems:
        raise Refusal(problems)
    try:
        return OmegaConf.to_object(OmegaConf.unsafe_merge(pickle.loads(_pickled_schema()), escaped(plain)))
    except (OmegaConfBaseException, OverflowError) as error:
        raise Refusal([Problem(str(getattr(error, "full_key", None) or "settings"), first_line(error))]) from error


def _holds_tables(plain: dict[str, Any], key: str) -> bool:
    """Whether the list or the pairs at a dotted key hold lists or tables, which OmegaConf overlooks."""
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(item, list | dict) for item in items)


def escaped(value: Any) -> Any:
    """A value that OmegaConf reads as the plain one: it halves the backslashes before `${` and takes one for an escape."""
    if isinstance(value, dict):
        return {key: escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [escaped(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


@functools.cache
def _pickled_schema() -> bytes:
    """The schema's config: read back in a thirtieth of the time that it takes to make, which counts in a sweep."""
    return pickle.dumps(OmegaConf.structured(Settings))


def command_text() -> str:
    """The command as it can be typed again."""
    program = ["sft", "train"] if by_name() else ["python", os.path.relpath(sys.argv[0])]
    return shlex.join([*program, *sys.argv[1:]])


def where_it_looked(command: str) -> tuple[list[str], list[str]]:
    """(flags, overrides) of a command that say where Hydra finds its files and starts its jobs, for one that follows it."""
    try:
        args, _ = get_args_parser().parse_known_args(shlex.split(command)[2:])
    except (ValueError, SystemExit):  # of sweep.json, which anyone may have written
        return [], []
    flags = (("--config-path", args.config_path), ("--config-dir", args.config_dir), ("--config-name", args.config_name))
    places = ("hydra.searchpath=", "hydra/launcher=", "hydra.launcher.")
    return [w for flag, value in flags if value for w in (flag, value)], [w for w in args.overrides if w.startswith(places)]
