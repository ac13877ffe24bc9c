"""The model card: README.md of an artifact, made from what the run folder knows.

Texts that come from outside (data, completions, names, settings) show as text, whatever is in them. Folders of this machine are
not published: of a local file or model only its name is shown. What is not known, such as a licence, is left out and noted.
"""

import functools
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import jinja2

from sft.config import schema
from sft.config.method import GRPO, MethodFacts, facts_of
from sft.config.reward_names import short_name
from sft.export.hub import repo_for
from sft.model import builtin
from sft.paths import ASSETS
from sft.report.summary import merge_steps, summarise
from sft.storage.jsonio import number, read_json, read_lines

KINDS = {
    "adapter": "LoRA adapter",
    "merged_16bit": "Merged model in 16 bit",
    "merged_4bit": "Merged model in 4 bit (bitsandbytes)",
    "gguf": "GGUF files",
}

LIBRARIES = {"adapter": "peft", "merged_16bit": "transformers", "merged_4bit": "transformers"}

CURVE_ROWS, SAMPLES = 12, 4

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)

LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")

# Known without reading their cards: what ships with the project.
EMBEDDED_LICENCE = {builtin.SMOLLM2: "apache-2.0"}

DATA_LICENCE = {"twists": "apache-2.0", "twist_pairs": "apache-2.0", "sums": "apache-2.0"}

DATA_LANGUAGE = {"twists": ["zh", "en"], "twist_pairs": ["zh", "en"], "sums": ["en"]}

# Settings whose value is a place on this machine, if it is not one of a few words.
PATH_KEYS = {"dataset.path", "dataset.eval_path", "model.chat_template", "resume", "run"}
PATH_KEYS |= {"hydra.run.dir", "hydra.sweep.dir", "hydra.searchpath"}

PATH = re.compile(
    r"""(?<![\w/.:\\-])(?:file:/{2})?(?:~|\.{1,2}|[A-Za-z]:)?(?:[\\/][^\s\\/'",;=\[\](){}<>|`]+){2,}[\\/]?""", re.ASCII
)


def write_card(artifact: Path, run_folder: Path, format: str, repo: str | None = None) -> Path:
    """Write README.md into the folder of an artifact and return its path.

    `format` is one of `adapter`, `merged_16bit`, `merged_4bit`, `gguf`; `repo` is `export.hub.repo`, without a suffix.
    Files that the run folder lacks, and keys that they lack, leave gaps in the card.
    """
    from huggingface_hub import ModelCard

    assert not repo or HUB_ID.fullmatch(repo), "checked with the settings"
    run, preflight = read_json(run_folder / "run.json"), read_json(run_folder / "preflight.json")
    verify = read_json(run_folder / "export" / "verify.json")
    rows = merge_steps(read_lines(run_folder / "metrics.jsonl"))
    samples = read_lines(run_folder / "samples.jsonl")
    base, data, method = _base(run), _data(run, preflight), facts_of(run)
    artifacts = {name: found for name, found in _dict(verify, "artifacts").items() if isinstance(found, dict)}
    context = {
        "name": repo_for(repo, format).split("/")[-1] if repo else None,
        "format": format,
        "kind": KINDS[format],
        "where": repo_for(repo, format) if repo else "path/to/this/folder",
        "on_hub": bool(repo),
        "base": base,
        "data": data,
        "run": run,
        "lora": _dict(run, "settings", "lora"),
        "start": _start(run),
        "differs": _differences(run),
        "method": method,
        "rewards": _rewards(run) if method is GRPO else [],
        "metrics": summarise({**run, "metrics": {k: number(v) for k, v in _dict(run, "metrics").items()}}, rows),
        "curve": _curve(rows, method),
        "samples": _before_and_after(samples),
        "held_out": bool(samples) and all(line.get("source") == "held_out" for line in samples),
        "template": preflight.get("template"),
        "prompt": next((line.get("prompt") for line in samples), None),
        "reference": _dict(verify, "reference"),
        "not_rewarded": _public(str(_dict(verify, "reference").get("rewards_not_compared") or "")),
        "checked": {k: v for k, v in artifacts.items() if k == format or k.startswith(f"{format}/")},
        "failures": _failures(artifacts, format),
        "command": _public_command(str(run.get("command") or "")),
        "versions": _dict(run, "versions"),
        "hardware": _dict(run, "hardware"),
        **_gguf_files(artifact, repo),
    }
    metadata = _metadata(base, data, format, repo, artifacts)
    if method is GRPO:
        metadata.tags[0] = method.name
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n{_template().render(context)}")
    target, temporary = artifact / "README.md", artifact / f".README.md.{os.getpid()}"
    card.save(temporary)
    os.replace(temporary, target)
    return target


def _metadata(base: dict, data: dict, format: str, repo: str | None, artifacts: dict) -> Any:
    """The front matter, in the hub's own terms; nothing in it that is not known."""
    from huggingface_hub import ModelCardData

    relation, name = "adapter" if format == "adapter" else "finetune", base["id"]
    merged = artifacts.get("merged_16bit", {})
    if format in ("gguf", "merged_4bit") and repo and merged.get("status") == "ok":
        relation, name = "quantized", repo_for(repo, "merged_16bit")
    tags = ["sft", *(["lora"] if format == "adapter" else []), *(["gguf"] if format == "gguf" else [])]
    known = {
        "base_model": name,
        "base_model_relation": relation if name else None,
        "library_name": LIBRARIES.get(format),
        "pipeline_tag": "text-generation",
        "license": base["licence"],
        "license_name": base["licence_name"],
        "license_link": base["licence_link"],
        "datasets": [data["id"]] if data["id"] else None,
        "language": data["language"],
        "tags": tags,
    }
    return ModelCardData(**{key: value for key, value in known.items() if value})


# ------------------------------------------------------------------------------------- where model and data come from


def _base(run: dict) -> dict[str, Any]:
    """The base model: its name to show, its id on the hub, and its licence where its own card says one."""
    name = str(_dict(run, "model").get("name") or _dict(run, "settings", "model").get("name") or "unknown")
    revision = _dict(run, "settings", "model").get("revision")
    source = str(_dict(run, "model").get("source") or "")
    folder = source.removeprefix("local folder ") if source.startswith("local folder ") else None
    local = folder is not None or _is_path(name)
    on_hub = not local and HUB_ID.fullmatch(name) is not None
    known: dict[str, Any] = {}
    if folder:
        known = _card_of(Path(folder) / "README.md")
    elif on_hub:
        known = _card_of(_cached_card(name, "model", revision)) or {"license": EMBEDDED_LICENCE.get(name)}
    licence = _licence(known)
    other = {key: str(known.get(key) or "") if licence == "other" else "" for key in ("license_name", "license_link")}
    return {
        "name": _last(name) if local else name,
        "id": name if on_hub else None,
        "source": f"local folder {_last(folder)}" if folder else _public(source),
        "licence": licence,
        "licence_name": other["license_name"] if re.fullmatch(r"[\w.-]+", other["license_name"]) else None,
        "licence_link": other["license_link"] if re.fullmatch(r"https://[\w./%-]+", other["license_link"]) else None,
    }


def _start(run: dict) -> str | None:
    """The adapter that the run trained further: its id on the hub, or the name of the run or folder that it came from."""
    place = _dict(run, "start_from").get("adapter")
    if not isinstance(place, str) or not _is_path(place):
        return place if isinstance(place, str) else None
    return _last(re.sub(r"[\\/]adapter[\\/]?$", "", place))


def _data(run: dict, preflight: dict) -> dict[str, Any]:
    """The data: its name to show, its id on the hub, hash, size, and licence and languages where they are known."""
    settings, facts = _dict(run, "settings", "dataset"), _dict(run, "data")
    name, path = str(settings.get("name") or ""), settings.get("path")
    shown = str(facts.get("source") or preflight.get("source") or path or name or "unknown")
    on_hub = not path and name not in schema.DATASETS and HUB_ID.fullmatch(name) is not None
    known = _card_of(_cached_card(name, "dataset", settings.get("revision"))) if on_hub else {}
    shipped = not path and name in schema.DATASETS
    languages = known.get("language") or (DATA_LANGUAGE.get(name) if shipped else None)
    languages = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    return {
        "name": ", ".join(map(_last, shown.split(", "))) if path or _is_path(shown) else shown,
        "id": name if on_hub else None,
        "local": bool(path),
        "hash": facts.get("hash") or preflight.get("data_hash"),
        "train_rows": number(facts.get("train_rows")),
        "eval_rows": number(facts.get("eval_rows")),
        "licence": _licence(known) or (DATA_LICENCE.get(name) if shipped else None),
        "language": [code for code in languages if isinstance(code, str) and re.fullmatch(r"[a-z]{2,3}", code)] or None,
    }


def _cached_card(name: str, repo_type: str, revision: Any) -> Path | None:
    """README.md of a hub repository, if the client's cache has it; nothing is downloaded for a card."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "README.md", revision=str(revision or "main"), repo_type=repo_type)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _card_of(path: Path | None) -> dict[str, Any]:
    """The metadata of a card; {} where there is none or it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path) if path and path.is_file() else None
    except Exception:  # somebody else's file: broken YAML, not UTF-8, no right to read; all mean that nothing is known
        found = None
    return found if isinstance(found, dict) else {}


def _licence(known: dict) -> str | list[str] | None:
    """The licence that a card states, if it has the form of the hub's identifiers."""
    found = known.get("license")
    listed = found if isinstance(found, list) else [found]
    good = [entry for entry in listed if isinstance(entry, str) and LICENCE.fullmatch(entry)]
    return None if not good or len(good) != len(listed) else good if isinstance(found, list) else good[0]


# ------------------------------------------------------------------------------------------------ what is shown


def _differences(run: dict) -> list[tuple[str, Any, Any]]:
    """Settings that are not the defaults: (key, value, default), but for where things were put on this machine."""
    found = []
    for key, pair in _dict(run, "differs_from_defaults").items():
        if isinstance(pair, dict) and not key.startswith(("tracking.", "export.")):
            value, default = (_public_value(key, pair.get(name)) for name in ("value", "default"))
            if key == "model.name" and str(_dict(run, "model").get("source")).startswith("local folder"):
                value = _last(str(value))
            found.append((key, value, default))
    return found


def _rewards(run: dict) -> list[tuple[str, float | None]]:
    """(name, weight) of what the run was rewarded by."""
    method = _dict(run, "settings", "method")
    names, weights = (
        method.get(key) if isinstance(method.get(key), list) else [] for key in ("reward_funcs", "reward_weights")
    )
    weights = weights or [1.0] * len(names)
    return [(short_name(str(name)), number(weight)) for name, weight in zip(names, weights, strict=False)]


def _curve(rows: list[dict], method: MethodFacts) -> list[dict]:
    """A few rows of the curve of what ranks runs: the first and the last evaluation, and others spread evenly."""
    evaluated = [row for row in rows if row.get(method.metric) is not None]
    logged = evaluated if len(evaluated) > 2 else [row for row in rows if method.noun in row or method.metric in row]
    if len(logged) <= CURVE_ROWS:
        return logged
    last = len(logged) - 1
    return [logged[round(i * last / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]


def _before_and_after(lines: list[dict]) -> list[dict]:
    """The first prompts with the completion of the base model and the last one: only prompts that have both."""
    prompts: dict[str, dict] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is None:
            continue
        entry = prompts.setdefault(str(line.get("index")), {"question": line.get("question") or line.get("prompt")})
        entry["reference"] = line.get("reference")
        if step == 0:
            entry["before"] = line.get("completion")
        elif step >= entry.get("step", 0):
            entry["after"], entry["step"] = line.get("completion"), step
    return [entry for entry in prompts.values() if "before" in entry and "after" in entry][:SAMPLES]


def _failures(artifacts: dict, format: str) -> list[tuple[str, str, str, str]]:
    """Checks that an artifact of this format did not pass: (artifact, check, expected, found)."""
    failed = []
    for name, row in artifacts.items():
        if name != format and not name.startswith(f"{format}/"):
            continue
        checks = row.get("checks") if isinstance(row.get("checks"), list) else []
        for check in checks:
            if isinstance(check, dict) and check.get("ok") is False:
                failed.append((name, check.get("name"), *(_public(str(check.get(key))) for key in ("expected", "found"))))
    return failed


def _gguf_files(artifact: Path, repo: str | None) -> dict[str, Any]:
    """GGUF files of the artifact, adapters apart from models, and its Modelfiles with a name for Ollama each."""
    names = sorted(p.name for p in artifact.glob("*.gguf") if not p.name.startswith("."))
    adapters = [n for n in names if re.search(r"adapter|lora", n, re.IGNORECASE)]
    model = re.sub(r"[^a-z0-9._-]+", "-", (repo or "my/model").split("/")[-1].lower())
    files = sorted(p.name for p in artifact.glob("Modelfile*"))
    return {
        "gguf": [n for n in names if n not in adapters],
        "gguf_adapters": adapters,
        "modelfiles": [(n, model + n.removeprefix("Modelfile").replace(".", ":", 1)) for n in files],
    }


# ------------------------------------------------------------------------------------------- nothing of this machine


def _public_value(key: str, value: Any) -> Any:
    """A setting's value without folders of this machine."""
    if isinstance(value, dict):
        return {name: _public_value("", inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public_value(key, inner) for inner in value]
    if not isinstance(value, str):
        return value
    if key in PATH_KEYS and value.startswith("["):
        return re.sub(r"[^\[\],\"']+", lambda match: _last(match[0].strip()) if match[0].strip() else match[0], value)
    if (key in PATH_KEYS and "{" not in value) or _is_path(value):
        return _last(value)
    return _public(value)


def _public_command(command: str) -> str:
    """The command without folders of this machine; a value that was a path is its last part."""
    try:
        words = shlex.split(command)
    except ValueError:
        return _public(command)
    shown = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            bare = value.strip("'\"")
            public = _public_value(key.lstrip("+~"), bare)
            shown.append(word if public == bare else f"{key}={public}")
        else:
            shown.append(_last(word) if _is_path(word) else _public(word))
    return shlex.join(shown)


def _is_path(text: str) -> bool:
    """Whether a whole text is a path outside of the working folder, and not a sentence that begins like one."""
    return re.match(r"(/|~|\.{1,2}[\\/]|\\\\|[A-Za-z]:[\\/]|file:)", text) is not None and not re.search(r"\s\S*\s", text)


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/ "))[-1] or "unnamed"


def _public(text: str) -> str:
    """A text with every absolute path in it cut down to its last part."""
    return PATH.sub(lambda match: _last(match[0]), text)


# ------------------------------------------------------------------------------------------------- everything as text


def clean(value: Any) -> str:
    """A value as text without control characters: they become visible signs, and half characters a replacement sign."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", errors="replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c in "\n\t" else _visible(c) for c in text)


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "\N{REPLACEMENT CHARACTER}"
    if kind in ("Zl", "Zp"):
        return "\n"
    bidirectional = character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they turn the order around
    return "\N{REPLACEMENT CHARACTER}" if bidirectional else character


def code(value: Any, limit: int = 300) -> str:
    """A value as one line of code in a sentence or a table cell."""
    text = " ".join(clean(value).split()) or "(empty)"
    text = text if len(text) <= limit else text[:limit] + " …"
    if re.fullmatch(r"""[\w .,:;/=+@%#()'"&?!\[\]{}~^*…-]+""", text):
        return f"`{text}`"
    # As HTML with every sign as its number: no renderer takes such a sign for the border of a cell, a tag or a link.
    return "<code>" + "".join(c if c.isalnum() or c == " " or not c.isascii() else f"&#{ord(c)};" for c in text) + "</code>"


def fence(value: Any, limit: int = 1500, language: str = "text") -> str:
    """A text as a block of code, in a fence longer than any in the text."""
    text = clean("" if value is None else value)
    text = text if len(text) <= limit else text[:limit] + " …"
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def fixed(value: Any, pattern: str = ".4f") -> str:
    """A number in a pattern; a dash where there is none."""
    return "–" if number(value) is None else format(value, pattern)


def count(value: Any) -> str:
    """A whole number; a dash where there is none."""
    return fixed(value, ",.0f")


def size(value: Any) -> str:
    """Bytes in MB or GB, as files are sold."""
    if number(value) is None:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def shell(text: str) -> str:
    """A word of a command line."""
    return shlex.quote(clean(text))


@functools.cache  # compiling it takes longer than all else about a card
def _template() -> jinja2.Template:
    """sft/assets/card.md.j2; each value in it goes through one of the filters above."""
    loader = jinja2.FileSystemLoader(ASSETS)
    markdown = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined, autoescape=False
    )
    markdown.filters |= {f.__name__: f for f in (code, count, fence, fixed, size, shell)}
    return markdown.get_template("card.md.j2")


def _dict(found: dict, *keys: str) -> dict:
    """A mapping within mappings; {} where it is missing or something else."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
