"""What exports need before a run begins: packages, disk, and formats that can be made."""

import shutil
from pathlib import Path

from sft.config.schema import ExportSettings, Settings
from sft.errors import Problem
from sft.export import gguf, hub
from sft.model.hub import read_config
from sft.runs.saved import check_base
from sft.storage.jsonio import read_json

FORMATS = ("adapter", "merged_16bit", "merged_4bit", "gguf")


def check_export(folder: Path, settings: Settings) -> list[Problem]:
    """What can be known to keep an export from working before a weight is loaded: the base, parts, the disk, the hub."""
    wanted, problems = settings.export, check_base(folder, settings) if settings.lora.enabled else []
    if "gguf" in wanted.formats:
        problems += gguf.missing_parts() or gguf.check_architecture(read_config(settings.model), wanted.formats)
    problems += check_disk(folder, settings)
    if wanted.hub.repo and not problems:
        problems += hub.check_access(wanted.hub.repo, wanted.formats, wanted.hub.private)
    return problems


def check_disk(folder: Path, settings: Settings) -> list[Problem]:
    """Whether the disk holds what `settings.export` would write, by the number of parameters in run.json."""
    parameters = (read_json(folder / "run.json").get("model") or {}).get("parameters")
    need = sum(bytes_a_parameter(settings.export).values()) * (parameters or 0)
    free = shutil.disk_usage(folder).free
    if need <= free:
        return []
    formats = ",".join(settings.export.formats)
    why = f"It needs about {need / 2**30:.1f} GiB on the disk of {folder}, and {free / 2**30:.1f} GiB are free."
    return [Problem(f"export.formats=[{formats}]", why, "free some space, or ask for fewer formats at a time")]


def count_artifacts(wanted: ExportSettings) -> int:
    """How many artifacts are made and proven one by one."""
    kinds = len(wanted.gguf.quantizations) + wanted.gguf.adapter if "gguf" in wanted.formats else 0
    return len({*wanted.formats} - {"gguf"}) + kinds


def bytes_a_parameter(wanted: ExportSettings) -> dict[str, float]:
    """Bytes a parameter of each file, those in between included; by llama.cpp's bits a weight, with a little over."""
    sizes = {"merged 16-bit": 2.0} if {"merged_16bit", "merged_4bit", "gguf"} & set(wanted.formats) else {}
    sizes |= {"merged 4-bit": 0.8} if "merged_4bit" in wanted.formats else {}
    if "gguf" in wanted.formats:
        known = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07, "q6_k": 0.85, "q5_k_m": 0.75, "q4_k_m": 0.65}
        sizes |= {"GGUF f16": 2.0} | {f"GGUF {q}": known.get(q, 0.75) for q in wanted.gguf.quantizations if q != "f16"}
    return sizes
