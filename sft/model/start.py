"""An adapter that training starts from: found, compared with the settings and the model, and loaded."""

import hashlib
from pathlib import Path
from typing import Any

from sft.config import lora_rules
from sft.config.keys import typed
from sft.config.lora_rules import CHOOSE_LAYERS, adapter_folder, base_of_adapter, noted_base
from sft.config.schema import LoraSettings, MethodName, ModelSettings, Reference, Settings
from sft.errors import Problem, Refusal, first_line, refuse
from sft.model.files import check_adapter_files
from sft.model.targets import parameters_of, reached
from sft.paths import expanded
from sft.storage.jsonio import read_json

MUTATED = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts that change the model, as an adapter's config names them until it is saved for the model as it was."""

FILES = ("adapter_config.json", "adapter_model.safetensors")


def find_adapter(text: str) -> Path:
    """The folder of the adapter that `lora.start_from` names, fetched where it is on the hub. Raises Refusal without one."""
    if place := adapter_folder(text):
        return place
    what = typed("lora.start_from", text)
    if not lora_rules.is_hub_id(text) or expanded(text).exists():
        raise refuse(what, "There is no adapter.", "lora.start_from=outputs/<run>")
    from huggingface_hub import hf_hub_download

    try:
        paths = [Path(hf_hub_download(text, name)) for name in FILES]
    except Exception as error:  # as many kinds as there are ways to be offline
        why = f"There is no such folder, and the hub's adapter cannot be had: {first_line(error)}"
        raise refuse(what, why, f"hf download {text} --local-dir my_adapter   then: lora.start_from=my_adapter") from error
    return paths[0].parent


def check_start(settings: Settings, model: Any) -> tuple[list[Problem], list[str], dict[str, Any]]:
    """(problems, warnings, facts for the record) of training the adapter of `lora.start_from` further: its files, base, rank
    and layers against the settings. `model` needs no weights.
    """
    lora = settings.lora
    what = typed("lora.start_from", lora.start_from)
    try:
        folder = find_adapter(lora.start_from)
        problems = check_adapter_files(folder, what)
        other = {} if problems else lora_rules.other_settings(folder, lora)
    except Refusal as refusal:
        return refusal.problems, [], {}
    except ValueError as error:
        return [Problem(what, f"{error}", "bring the file back as the run wrote it")], [], {}
    if problems:
        return problems, [], {}
    if str(read_json(folder / "adapter_config.json").get("init_lora_weights")).startswith(MUTATED):
        run = folder.parent.parent / "adapter"
        fix = (
            typed("lora.start_from", str(run))
            if (run / "adapter_config.json").is_file()
            else "lora.start_from=<another adapter>"
        )
        why = "Its start was taken out of the model's weights and not put back: it does not fit the model as it is."
        return [Problem(what, why, fix)], [], {}
    if _layers(folder, model, lora) == {*reached(model, lora)}:  # the same layers may be named in other words
        other = {k: v for k, v in other.items() if k.removeprefix("extra.") not in ("target_modules", *CHOOSE_LAYERS)}
    elif not other:
        problems.append(Problem(what, "Its weights are of other layers than its config names.", "lora.start_from=null"))
    base = base_of_adapter(folder)
    warnings = []
    if base and not _is_model(settings.model, base, folder):
        if _last(base) == _last(settings.model.name):
            warnings.append(f"{what} was trained on {base}, which is taken to be the same as {settings.model.name}.")
        else:
            why = f"The adapter was trained on {base}, and its weights mean nothing to another model."
            problems.append(Problem(f"{what} model.name={settings.model.name}", why, typed("model.name", base)))
    if other:
        differs = [f"lora.{key} is {_shown(there)} there and {_shown(now)} here" for key, (there, now) in other.items()]
        fix = " ".join(typed(f"lora.{key}", there) for key, (there, _) in other.items())
        problems.append(Problem(what, f"The adapter was made otherwise: {', '.join(differs)}.", fix))
    facts = {"adapter": str(folder) if adapter_folder(lora.start_from) else lora.start_from, **({"base": base} if base else {})}
    if settings.method.name == MethodName.dpo and settings.method.reference == Reference.start:
        facts["hash"] = hash_file(folder / "adapter_model.safetensors")  # a part of every step's loss
    return problems, warnings, facts


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_start(model: Any, lora: LoraSettings) -> Any:
    """The model with the weights of `lora.start_from` in its adapter. Raises Refusal where they do not fit it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    what, folder = typed("lora.start_from", lora.start_from), find_adapter(lora.start_from)
    weights = load_file(folder / "adapter_model.safetensors")
    try:
        result = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise refuse(what, f"Its weights do not fit the adapter: {first_line(error)}", "lora.start_from=null") from error
    missing = [n for n in result.missing_keys if ".lora_" in n or "modules_to_save" in n or "trainable_tokens" in n]
    if wrong := [*missing, *result.unexpected_keys]:
        why = f"Its weights are not those of the adapter: {len(wrong)} differ, {wrong[0]} among them."
        raise refuse(what, why, "lora.start_from=null")
    return model


def _layers(folder: Path, model: Any, lora: LoraSettings) -> set[str]:
    """Names of the layers that the adapter in `folder` sits on, without those whose parameters it names one by one."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = file.keys()
    names = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in keys if ".lora_" in n}
    parameters = parameters_of(model, lora.extra.get("target_parameters") or [])
    return {name.split(".lora_")[0] for name in names} - {name.rpartition(".")[0] for name in parameters}


def _is_model(model: ModelSettings, base: str, folder: Path) -> bool:
    """Whether `base`, of which the adapter in `folder` was made, is the very model that the settings name."""
    from sft.model.hub import locate

    names = [model.name, locate(model, weights=False)[0]]
    known = [base, *filter(None, [noted_base(folder)])]
    folders = [expanded(name) for name in known]
    here = Path(names[1])
    return bool({*names} & {*known}) or any(f.is_dir() and here.is_dir() and f.samefile(here) for f in folders)


def _last(name: str) -> str:
    """A model's own name, without where it lies and how it is quantised."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")


def _shown(value: Any) -> str:
    return "not set" if value is None else typed("", value).strip("'").removeprefix("=")
