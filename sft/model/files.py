"""A model's folder as data from elsewhere: what its files say is checked before a library believes it. Reads no weight."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from sft.config.schema import ModelSettings
from sft.errors import Problem, first_line

INDEX = "model.safetensors.index.json"

HEADER_LIMIT = 100 * 2**20
"""Bytes of a safetensors header, the limit of the safetensors library itself."""

EMBEDDINGS = ("embed_tokens.weight", "wte.weight")

WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size")
"""Keys that the width of the embeddings can stand under."""

PLAIN = ("F64", "F32", "F16", "BF16")
"""Types of which a number is a column; quantised ones may be packed."""

IMPORTED = {"megatron_core": (None, "megatron.core"), "megatron_config": (None,), "auto_mapping": (None,)}
"""Keys of an adapter's config that name a module, and their values where none is imported."""


def check_model_files(folder: Path, model: ModelSettings, what: str | None = None) -> list[Problem]:
    """What is wrong with the files of the model in `folder`: each problem names its file, behind `what`.

    They could name code or files outside of the folder, or sizes and tokens that cannot be.
    """
    what = what or f"model.name={model.name}"
    try:
        config, generation, index = (_read(folder / name) for name in ("config.json", "generation_config.json", INDEX))
    except ValueError as error:
        return [Problem(what, f"{error}", "bring the file back as its maker wrote it")]
    problems = [] if model.trust_remote_code else _check_kernels(config)
    problems += _check_stop_tokens("generation_config.json", generation, _vocabulary(config))
    if not (folder / "generation_config.json").is_file():  # transformers makes one of config.json
        problems += _check_stop_tokens("config.json", config, _vocabulary(config))
    problems += _check_index(index)
    if not problems:
        for file in sorted(folder.glob("*.safetensors")):
            problems += _check_weights(file, config)
    return [Problem(f"{what}: {p.what}", p.why, p.fix) for p in problems]


def check_adapter_files(folder: Path, what: str) -> list[Problem]:
    """What is wrong with the adapter in `folder`, behind `what`: PEFT would import what its config names, or not know it."""
    from peft import LoraConfig

    fix = "bring the file back as the run wrote it"
    try:
        config = _read(folder / "adapter_config.json")
    except ValueError as error:
        return [Problem(what, f"{error}", fix)]
    known = {field.name for field in fields(LoraConfig) if field.init}
    wrong = [f"It asks for {key}, which is not used here." for key, usual in IMPORTED.items() if config.get(key) not in usual]
    if config.get("peft_type") != "LORA":
        wrong.append(f"peft_type is {str(config.get('peft_type'))[:40]!r}, and a run trains LORA.")
    if strange := sorted(set(config) - known):
        wrong.append(f"The installed PEFT does not know {', '.join(key[:40] for key in strange[:5])}.")
    problems = [Problem("adapter_config.json", why, fix) for why in wrong]
    problems = problems or _check_weights(folder / "adapter_model.safetensors", {})
    return [Problem(f"{what}: {p.what}", p.why, p.fix) for p in problems]


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises ValueError for anything else in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no object")
    return content


def _vocabulary(config: dict[str, Any]) -> Any:
    inner = config.get("text_config")  # of a model that reads pictures too
    return (inner.get("vocab_size") if isinstance(inner, dict) else None) or config.get("vocab_size")


def _check_kernels(config: dict[str, Any]) -> list[Problem]:
    """An attention named as a repository, from which transformers loads code where the package `kernels` is installed."""
    named, waiting = [], [(False, config)]
    while waiting:
        kernels, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(kernels or "_implementation" in key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(kernels, inner) for inner in value]
        elif kernels and isinstance(value, str) and "/" in value:
            named.append(value)
    if not named:
        return []
    why = f"It names {named[0][:80]!r} as its attention: code from the hub, which would run with your rights."
    fix = "model.trust_remote_code=true   runs it; set it only for a repository that you have read"
    return [Problem("config.json", why, fix)]


def _check_stop_tokens(file: str, content: dict[str, Any], vocabulary: Any) -> list[Problem]:
    named = content.get("eos_token_id")
    tokens = named if isinstance(named, list) else [named]
    most = vocabulary if isinstance(vocabulary, int) else 2**31
    wrong = [t for t in tokens if t is not None and not (type(t) is int and 0 <= t < most)]
    if not wrong:
        return []
    why = f"eos_token_id holds {str(wrong[0])[:40]}, which is no token of a vocabulary of {most}."
    return [Problem(file, why, "correct it in a local copy of the model")]


def _check_index(index: dict[str, Any]) -> list[Problem]:
    names = index.get("weight_map", {})
    values = names.values() if isinstance(names, dict) else [names]
    wrong = [n for n in values if not isinstance(n, str) or n == ".." or Path(n).name != n]
    if not wrong:
        return []
    why = f"It names {str(wrong[0])[:80]!r}, and weights have to lie in the model's own folder."
    return [Problem(INDEX, why, "take the model from its maker again")]


def _check_weights(file: Path, config: dict[str, Any]) -> list[Problem]:
    """A safetensors file whose header cannot be, or whose embeddings have other sizes than config.json says."""
    fix = "take the model from its maker again"
    if not file.is_file():
        return [Problem(file.name, "It is no file.", fix)]
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            return [
                Problem(file.name, f"Its header would have {length:,} bytes, and the file has {size:,}: it is damaged.", fix)
            ]
        try:
            header = json.loads(opened.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            shapes = {k: list(v["shape"]) for k, v in tensors.items() if k.endswith(EMBEDDINGS)}
            places = sorted(tuple(v["data_offsets"]) for v in tensors.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return [Problem(file.name, f"Its header cannot be read: {first_line(error)}.", fix)]
    if why := _odd_places(places, size - 8 - length):
        return [Problem(file.name, f"{why}: it is damaged, or was not copied to its end.", fix)]
    problems, rows, widths = [], _vocabulary(config), _widths(config)
    for name, shape in shapes.items():
        if isinstance(rows, int) and len(shape) == 2 and shape[0] != rows:
            why = f"vocab_size is {rows}, and {name} in {file.name} has {shape[0]} rows."
            problems.append(Problem("config.json", why, fix))
        if widths and len(shape) == 2 and shape[1] not in widths.values() and tensors[name].get("dtype") in PLAIN:
            key, width = next(iter(widths.items()))
            why = f"{key} is {width}, and {name} in {file.name} has {shape[1]} columns."
            problems.append(Problem("config.json", why, fix))
    return problems


def _widths(config: dict[str, Any]) -> dict[str, int]:
    inner = config.get("text_config")
    found = [(key, of.get(key)) for of in (inner, config) if isinstance(of, dict) for key in WIDTHS]
    return {key: width for key, width in found if type(width) is int}


def _odd_places(places: list[tuple], size: int) -> str | None:
    """What cannot be about the places of the tensors of a file, in their order; `size` bytes of data follow the header."""
    end = 0
    for place in places:
        if len(place) != 2 or any(type(at) is not int for at in place) or not 0 <= place[0] <= place[1]:
            return f"Its header puts a tensor at {str(list(place))[:60]}"
        if place[0] < end:
            return f"Its header puts two tensors on each other, at byte {place[0]:,} of the data"
        end = place[1]
    return f"Its header asks for {end:,} bytes of data, and {size:,} are there" if end > size else None
