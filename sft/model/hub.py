"""Where a model comes from: a local folder, the hub, or the copy that comes with the project; and why it cannot be had."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.lora_rules import start_overrides
from sft.config.rules import pickle_problem
from sft.config.schema import LoraSettings, ModelSettings
from sft.environment import hub_reachable, hub_unreachable
from sft.errors import Problem, Refusal, is_page, refuse
from sft.model import builtin
from sft.paths import expanded

log = logging.getLogger(__name__)


def read_config(model: ModelSettings) -> dict[str, Any]:
    """A model's config.json as it stands; empty if it cannot be had, which loading will say better."""
    where, _ = locate(model, weights=False)
    try:
        if not Path(where).is_dir():
            from huggingface_hub import hf_hub_download

            return json.loads(Path(hf_hub_download(where, "config.json", revision=model.revision)).read_text(encoding="utf-8"))
        return json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
    except Exception:  # as many kinds as there are ways to be offline
        return {}


def vocabulary_of(model: ModelSettings) -> int | None:
    """Rows of the model's embeddings by its config.json; None where that does not say."""
    config = read_config(model)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def locate(model: ModelSettings, weights: bool = True) -> tuple[str, str]:
    """Where to load from, as (folder or hub id, source for the record).

    In this order: a local folder; the hub, if it can be reached or already has the model in its cache; the copy that
    comes with the project. `weights=False` is enough for the tokenizer.
    """
    folder = expanded(model.name)
    if folder.is_dir():
        return str(folder.absolute()), f"local folder {folder.resolve()}"  # PEFT writes the first into adapter_config.json
    if model.name != builtin.TINY_RANDOM and _hub_has(model):
        return model.name, f"hub {model.name}" + (f" at {model.revision}" if model.revision else "")
    local = builtin.local_model(model.name, weights)
    if local is None:
        return model.name, f"hub {model.name}"  # loading it raises, with the reason
    return str(local), f"built-in {local.name}"


def weights_identity(model: ModelSettings, commit: str | None) -> list[Any] | None:
    """What the very weights of a model are known by: its commit on the hub, or the place, sizes and times of its files. None
    without a commit, and for a model with code of its own, which may come from elsewhere.
    """
    where, _ = locate(model)
    if model.trust_remote_code:
        return None
    if not Path(where).is_dir():
        return [where, commit] if commit else None
    folder = Path(where).resolve()
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [str(folder), [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in files]]


def adapter_problem(model: ModelSettings, lora: LoraSettings) -> list[Problem]:
    """The problem of a model on the hub that is an adapter alone: transformers would load its base with the adapter inside."""
    where, _ = locate(model, weights=False)
    if Path(where).is_dir() or read_config(model):
        return []
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(where, "adapter_config.json", revision=model.revision)).parent
        fix = start_overrides(folder, lora, model.name)
    except Exception:  # it is none, or cannot be had, which loading will say better
        return []
    why = "It is an adapter, not a whole model. lora.start_from trains it further."
    return [Problem(f"model.name={model.name}", why, fix)]


@contextlib.contextmanager
def refusing_failures(model: ModelSettings) -> Iterator[None]:
    """Turn what transformers raises where a model cannot be had into a Refusal."""
    try:
        yield
    except OSError as error:
        raise _load_failed(model, error) from error
    except ValueError as error:
        if is_page(error) and not expanded(model.name).is_dir():
            raise _load_failed(model, error) from error
        if not asks_for_code(error):
            raise
        raise Refusal([code_problem(model)]) from error


def asks_for_code(error: Exception) -> bool:
    """Whether transformers raised this because a model brings code that it was not allowed to run."""
    return "trust_remote_code" in str(error)


def code_problem(model: ModelSettings) -> Problem:
    """The problem of a model that brings code of its own while `model.trust_remote_code` is off."""
    why = "It brings Python code of its own, which would run on this machine with your rights. None of it was run."
    fix = "model.trust_remote_code=true   runs it; set it only for a repository that you have read"
    return Problem(f"model.name={model.name}", why, fix)


def _load_failed(model: ModelSettings, error: OSError | ValueError):
    text = str(error)
    what = f"model.name={model.name}"
    if is_page(error):  # its text names the file that was asked for
        return hub_unreachable(what, error, "model.name=/path/to/the/model")
    remote = not expanded(model.name).is_dir()  # whose name may hold any number
    if remote and ("gated" in text.lower() or "401" in text or "403" in text):
        fix = f"accept its licence at https://huggingface.co/{model.name}, then: hf auth login   or set HF_TOKEN"
        return refuse(what, "The model is gated or private, and this machine has no access to it.", fix)
    if "safetensors" in text:
        return Refusal([pickle_problem(model.name)])
    if hub_reachable() and ("not a valid model" in text or "404" in text or "Repository Not Found" in text):
        return refuse(what, "The hub has no such model.", "check the owner and the name at https://huggingface.co/models")
    return hub_unreachable(what, error, "model.name=/path/to/the/model")


def _hub_has(model: ModelSettings) -> bool:
    """Whether the hub's copy can be had: it is in the cache, or its config arrives (a connection alone may be a proxy's)."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model.name, "config.json", revision=model.revision or "main"), str):
        return True
    if not hub_reachable():
        return False
    if model.name != builtin.SMOLLM2:
        return True  # there is no other copy; loading says what is wrong
    try:
        hf_hub_download(model.name, "config.json", revision=model.revision)
    except Exception as error:  # whatever keeps the hub's copy away, the packaged one is here
        log.warning("The hub's copy of %s cannot be had (%s); taking the packaged one.", model.name, type(error).__name__)
        return False
    return True
