"""A model's folder as data from elsewhere: what its files say is checked before a library believes it. Reads no weight."""

import json
from pathlib import Path
from typing import Any

from sft.errors import Problem, first_line
from sft.settings import ModelSettings

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 * 2**20
"""Bytes of a safetensors header, the limit of the safetensors library itself."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def check_model_files(folder: Path, model: ModelSettings) -> list[Problem]:
    """What is wrong with the files of the model in `folder`: each problem names its file.

    They could name code or files outside of the folder, or sizes and tokens that cannot be.
    """
    try:
        config, generation, index = (_read(folder / name) for name in ("config.json", "generation_config.json", INDEX))
    except ValueError as error:
        return [Problem(f"model.name={model.name}", f"{error}", "bring the file back as its maker wrote it")]
    problems = [] if model.trust_remote_code else _check_kernels(config)
    problems += _check_stop_tokens(generation, _vocabulary(config))
    problems += _check_index(index)
    if not problems:
        for file in sorted(folder.glob("*.safetensors")):
            problems += _check_weights(file, config)
    return [Problem(f"model.name={model.name}: {p.what}", p.why, p.fix) for p in problems]


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


def _check_stop_tokens(generation: dict[str, Any], vocabulary: Any) -> list[Problem]:
    named = generation.get("eos_token_id")
    tokens = named if isinstance(named, list) else [named]
    most = vocabulary if isinstance(vocabulary, int) else 2**31
    wrong = [t for t in tokens if t is not None and not (type(t) is int and 0 <= t < most)]
    if not wrong:
        return []
    why = f"eos_token_id holds {str(wrong[0])[:40]}, which is no token of a vocabulary of {most}."
    return [Problem("generation_config.json", why, "correct it in a local copy of the model")]


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
            shapes = {k: list(v["shape"]) for k, v in header.items() if k.endswith(EMBEDDINGS)}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return [Problem(file.name, f"Its header cannot be read: {first_line(error)}.", fix)]
    rows = _vocabulary(config)
    return [
        Problem("config.json", f"vocab_size is {rows}, and {name} in {file.name} has {shape[0]} rows.", fix)
        for name, shape in shapes.items()
        if isinstance(rows, int) and len(shape) == 2 and shape[0] != rows
    ]
