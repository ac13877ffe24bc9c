"""Rules for the adapter's settings: its layers, PEFT's other options, and the adapter that it starts from.

Imports neither torch nor PEFT; what PEFT knows is read from its source text.
"""

import difflib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from sft.config.data_rules import why_lost
from sft.config.keys import shown, typed
from sft.config.patterns import pattern_fault
from sft.config.schema import Dtype, LoraSettings, Settings
from sft.config.upstream import fits, lora_config_options
from sft.errors import Problem, first_line
from sft.paths import expanded
from sft.storage.jsonio import read_json

LORAPLUS = "loraplus_lr_ratio"
"""LoRA+ (arXiv 2402.12354): how many times the learning rate of A is that of B. No option of LoraConfig, but of PEFT's
`create_loraplus_optimizer`."""

DECIDED_ELSEWHERE = {"base_model_name_or_path": "model.name", "revision": "model.revision"}
"""LoraConfig options that another setting decides."""

FIXED = ("task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode", "fan_in_fan_out", "runtime_config")
"""Those that a run fills in by itself."""

OF_ROWS = "It starts from what the training rows do in the model, which no run here measures before it makes the adapter."
OF_ITS_OWN = "It makes layers of another kind than LoRA's, of which neither merged weights nor GGUF files can be made."

REFUSED = {
    "layer_replication": "It repeats layers of the model, whose weights a merged model could not keep apart.",
    "megatron_config": "It is for Megatron's layers, which no model here has.",
    "megatron_core": "It names a module that PEFT would import, for Megatron's layers.",
    "eva_config": OF_ROWS,
    "corda_config": OF_ROWS,
    "lora_ga_config": OF_ROWS,
    "loftq_config": "LoftQ rounds the model's own weights to 4 bits; model.load_in_4bit=true trains on such ones.",
    "lora_bias": "It adds bias terms to layers that have none, which merged weights have no place for.",
    "use_qalora": "It is for weights in GPTQ's format, which are not loaded here.",
    "qalora_group_size": "It is for weights in GPTQ's format, which are not loaded here.",
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora",
                     "velora_config"), OF_ITS_OWN),
}  # fmt: skip
"""Those that cannot come to a right end here, and why."""

STARTS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_<n>")
"""Texts for `init_lora_weights`, beside true and false."""


def check_lora(settings: Settings) -> list[Problem]:
    """What is wrong with the adapter's settings, as far as it shows without the model."""
    lora, problems = settings.lora, []
    if lora.enabled:
        if not lora.target_modules:
            why = "An adapter needs at least one layer to sit on."
            problems.append(Problem("lora.target_modules=[]", why, "lora.target_modules=[all-linear]"))
        return problems + _check_patterns(lora) + _check_extra(settings) + _check_start(lora)
    for name in [f.name for f in fields(LoraSettings) if f.name != "enabled"]:
        if getattr(lora, name) != getattr(LoraSettings(), name):
            value = getattr(lora, name)
            what = typed(f"lora.{name}", value) if isinstance(value, dict) else f"lora.{name}={shown(value)}"
            problems.append(Problem(f"lora=none {what}", "Full fine-tuning has no adapter.", "lora=default"))
    if settings.model.load_in_4bit or settings.model.load_in_8bit:
        bits = "4bit" if settings.model.load_in_4bit else "8bit"
        why = "Quantised weights cannot be trained themselves; they need an adapter."
        fix = f"lora=default   or   model.load_in_{bits}=false"
        problems.append(Problem(f"lora=none model.load_in_{bits}=true", why, fix))
    if settings.model.dtype == Dtype.float16:
        why = "Gradients of weights in float16 cannot be scaled, which that format needs."
        problems.append(Problem("model.dtype=float16 lora=none", why, "model.dtype=auto"))
    return problems


def is_pattern(target: str) -> bool:
    """Whether an entry of `lora.target_modules` is a regular expression: it has what no module's name has."""
    return target != "all-linear" and re.search(r"[^\w.-]", target) is not None


def changes_base(lora: LoraSettings) -> bool:
    """Whether the adapter's start is taken out of the model's own weights, as PiSSA and OLoRA do."""
    return str(lora.extra.get("init_lora_weights")).startswith(("pissa", "olora"))


def _check_patterns(lora: LoraSettings) -> list[Problem]:
    problems = []
    for target in filter(is_pattern, lora.target_modules):
        if fault := pattern_fault(target):
            problems.append(Problem(typed("lora.target_modules", [target]), fault, "lora.target_modules=[all-linear]"))
    for name in ("rank_pattern", "alpha_pattern", "exclude_modules"):
        value = lora.extra.get(name)
        for pattern in value if isinstance(value, dict) else [value] * isinstance(value, str):
            if fault := pattern_fault(str(pattern)):
                problems.append(Problem(typed(f"lora.extra.{name}", value), fault, f"leave lora.extra.{name} out"))
    return problems


def _check_extra(settings: Settings) -> list[Problem]:
    """Names and types of `lora.extra`, and what of it cannot come to a right end."""
    lora, problems = settings.lora, []
    if not lora.extra:
        return problems
    known = lora_config_options()
    ours = {f.name for f in fields(LoraSettings)} & {*known}
    for name, value in lora.extra.items():
        what, leave = typed(f"lora.extra.{name}", value), f"leave lora.extra.{name} out"
        if name in ours:
            problems.append(Problem(what, "It has a setting of its own.", typed(f"lora.{name}", value)))
        elif name in DECIDED_ELSEWHERE:
            problems.append(Problem(what, "Another setting decides this.", typed(DECIDED_ELSEWHERE[name], value)))
        elif name in FIXED:
            problems.append(Problem(what, "A run fills this in by itself.", leave))
        elif name in REFUSED:
            problems.append(Problem(what, REFUSED[name], leave))
        elif name == LORAPLUS:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                problems.append(Problem(what, "It has to be a number above 0.", f"lora.extra.{name}=16"))
        elif name == "init_lora_weights":
            problems += _check_first_weights(settings, value)
        elif known and name not in known:
            names = sorted({*known, LORAPLUS} - {*ours, *FIXED, *REFUSED, *DECIDED_ELSEWHERE})
            close = [k for k in names if k.startswith(name)] + difflib.get_close_matches(name, names, 1, 0.6)
            why = "PEFT's LoraConfig has no such option." + (f" Did you mean {close[0]}?" if close else "")
            why += "" if close else f" It has: {', '.join(names)}."
            problems.append(Problem(what, why, typed(f"lora.extra.{close[0]}", value) if close else leave))
        elif known and not fits(value, known[name]):
            kind = re.sub(r"Optional\[(.*)\]$", r"\1 or null", _text_of(known[name]))
            problems.append(Problem(what, f"PEFT takes {kind}.", leave))
        elif name in ("rank_pattern", "alpha_pattern") and value:
            kinds, least = (int, 1) if name == "rank_pattern" else (int | float, 1e-9)
            good = {k: v for k, v in value.items() if isinstance(v, kinds) and not isinstance(v, bool) and v >= least}
            if good != value:
                words = "a whole number of at least 1" if name == "rank_pattern" else "a number above 0"
                fix = typed(f"lora.extra.{name}", good) if good else leave
                problems.append(Problem(what, f"Each layer's has to be {words}.", fix))
    return problems + _check_together(lora)


def _check_together(lora: LoraSettings) -> list[Problem]:
    """Options that need or exclude one another."""
    problems, extra = [], lora.extra
    if extra.get("layers_pattern") and extra.get("layers_to_transform") is None:
        what = typed("lora.extra.layers_pattern", extra["layers_pattern"])
        problems.append(Problem(what, "Alone it would be ignored.", "'lora.extra.layers_to_transform=[0,1]'   beside it"))
    if extra.get("layers_to_transform") is not None and any(map(is_pattern, lora.target_modules)):
        why = "A regular expression names its layers itself, and PEFT takes no numbers beside it."
        what = f"{typed('lora.extra.layers_to_transform', extra['layers_to_transform'])} lora.target_modules=..."
        problems.append(Problem(what, why, "leave lora.extra.layers_to_transform out"))
    if lora.start_from and extra.get("init_lora_weights") is not None:
        why = "The weights of lora.start_from are the adapter's start, so that it would be ignored."
        what = typed("lora.extra.init_lora_weights", extra["init_lora_weights"])
        problems.append(Problem(what, why, "leave lora.extra.init_lora_weights out"))
    return problems


def _check_first_weights(settings: Settings, value: Any) -> list[Problem]:
    what, model = typed("lora.extra.init_lora_weights", value), settings.model
    if isinstance(value, bool):
        return []
    if value in ("eva", "corda", "lora_ga"):
        return [Problem(what, OF_ROWS, "lora.extra.init_lora_weights=pissa")]
    if value == "loftq":
        return [Problem(what, REFUSED["loftq_config"], "leave lora.extra.init_lora_weights out")]
    if value == "mica":
        return [Problem(what, OF_ITS_OWN, "leave lora.extra.init_lora_weights out")]
    if not isinstance(value, str) or not re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_\d+)?", value):
        close = difflib.get_close_matches(str(value), STARTS[:-1], 1, 0.5)
        fix = f"lora.extra.init_lora_weights={close[0] if close else 'true'}"
        return [Problem(what, f"It can be: true, false, {', '.join(STARTS)}.", fix)]
    if changes_base(settings.lora) and (model.load_in_4bit or model.load_in_8bit):
        bits = "4bit" if model.load_in_4bit else "8bit"
        why = f"It takes the adapter's start out of the weights, and what is left would be rounded to {bits[0]} bits anew."
        return [Problem(f"{what} model.load_in_{bits}=true", why, f"model.load_in_{bits}=false")]
    return []


def _text_of(kind: Any) -> str:
    import ast

    return ast.unparse(kind)


# ------------------------------------------------------------------------------------------ an adapter to start from


def adapter_folder(text: str) -> Path | None:
    """The folder of the adapter that a local folder is or, as a run, holds; None where it has none."""
    folder = expanded(text)
    places = (folder, folder / "adapter")
    return next((p.absolute() for p in places if (p / "adapter_config.json").is_file()), None)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")


def start_overrides(folder: Path, lora: LoraSettings, name: str | None = None) -> str:
    """What is typed beside `lora` to train the adapter in `folder`, by its `name` on the hub where it has one, further: its
    model, rank and layers as they are there. Raises ValueError for a config that cannot be read.
    """
    base, other = base_of_adapter(folder), other_settings(folder, lora)
    words = [typed("lora.start_from", name or str(folder)), *(typed(f"lora.{key}", there) for key, (there, _) in other.items())]
    return " ".join([typed("model.name", base)] * bool(base) + words)


def other_settings(folder: Path, lora: LoraSettings) -> dict[str, tuple[Any, Any]]:
    """Settings by which the adapter in `folder` was made otherwise than `lora` says: their names, as `r` or
    `extra.rank_pattern`, with (the value there, the value here). What only says how it began is left out, and so are the
    layers, which can be named in many ways, unless they are named differently here too. Raises ValueError for a config that
    cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(first_line(error)) from None
    if not isinstance(config, dict):
        raise ValueError("adapter_config.json holds no object")
    found = {}
    for name, default in (("r", 8), ("lora_alpha", 8), ("bias", "none"), ("use_rslora", False), ("use_dora", False),
                          ("modules_to_save", []), ("target_modules", [])):  # fmt: skip
        there, here = config.get(name, default), getattr(getattr(lora, name), "value", getattr(lora, name))
        if isinstance(default, list):
            there = sorted([there] if isinstance(there, str) else there or [])
            here = sorted(here)
        if there != here:
            found[name] = there, here
    for name in ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices", *CHOOSE_LAYERS):
        there, here = (value if value not in ([], {}) else None for value in (config.get(name), lora.extra.get(name)))
        if there != here:
            found[f"extra.{name}"] = there, here
    return found


CHOOSE_LAYERS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Options that say, beside the targets, which layers get an adapter."""


def base_of_adapter(folder: Path) -> str | None:
    """The model that an adapter is for: as the run typed it that made it, else as PEFT noted it."""
    for run in (folder.parent, folder.parent.parent):
        name = ((read_json(run / "run.json").get("settings") or {}).get("model") or {}).get("name")
        if isinstance(name, str) and name:
            if not expanded(name).is_dir() and (noted := noted_base(folder)) and Path(noted).is_dir():
                return name if name == "tiny_random" or is_hub_id(name) else noted
            return name
    return noted_base(folder)


def noted_base(folder: Path) -> str | None:
    """The model that PEFT noted for the adapter in `folder`: a hub id, or a folder."""
    name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def model_problem(name: str, folder: Path, lora: LoraSettings) -> Problem:
    """The problem of a folder that `model.name` names and that holds no config.json: often an adapter, or a run."""
    what, inside = f"model.name={name}", [p.name for p in sorted(folder.iterdir()) if (p / "config.json").is_file()]
    if place := adapter_folder(name):
        why = "The folder holds an adapter, not a whole model. lora.start_from trains it further."
        try:
            return Problem(what, why, start_overrides(place, lora))
        except ValueError:
            return Problem(what, why, typed("lora.start_from", name))
    why = "The folder holds no config.json, so it is not a saved model."
    fix = typed("model.name", str(folder / inside[0])) if inside else "name the folder with config.json and the weights in it"
    return Problem(what, why, fix)


def _check_start(lora: LoraSettings) -> list[Problem]:
    """Whether there is an adapter where `lora.start_from` says, as far as this disk knows."""
    text = lora.start_from
    if not text:
        return []  # an empty one is refused as blank
    what = typed("lora.start_from", text)
    if lost := why_lost(text):
        return [Problem(what, lost, "lora.start_from=outputs/<run>")]
    folder = expanded(text)
    if not folder.is_dir():
        if is_hub_id(text) and not folder.parent.is_dir():
            return []  # asked for in the preflight
        near = folder.parent if folder.parent.is_dir() else Path(".")
        close = difflib.get_close_matches(folder.name, [p.name for p in near.iterdir() if p.is_dir()], 1)
        fix = typed("lora.start_from", str(near / close[0])) if close else "lora.start_from=outputs/<run>"
        return [Problem(what, "There is no such folder.", fix)]
    if adapter_folder(text):
        return []
    if (folder / "model" / "config.json").is_file() or (folder / "config.json").is_file():
        whole = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        why = "It holds a whole model and no adapter."
        return [Problem(what, why, f"lora.start_from=null {typed('model.name', str(whole))}")]
    runs = sorted(p.name for p in folder.iterdir() if adapter_folder(str(p)))
    why = "It holds no adapter: neither adapter_config.json nor adapter/."
    return [Problem(what, why, typed("lora.start_from", str(folder / runs[-1])) if runs else "lora.start_from=outputs/<run>")]
