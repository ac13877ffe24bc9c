"""What the reference says of the pairs, on the disk: a folder of the cache, named by a hash of all that it depends on."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import Timeout

from sft.config.method import DPO
from sft.config.schema import Reference, Settings
from sft.data import token_cache
from sft.distributed import group
from sft.errors import first_line
from sft.model.hub import weights_identity
from sft.model.start import FILES, find_adapter, hash_file
from sft.model.structure import base_of
from sft.storage import atomic, cache
from sft.storage.jsonio import jsonable
from sft.training.context import RunContext

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the same weights come to say something else of the same pairs: what is kept is kept by it."""

FILE = "log_probs.json"

LogProbs = dict[str, list[list[float]]]
"""The summed log probabilities of both answers of each pair, by the name of the split."""


def reference_hash(ctx: RunContext, model: Any, splits: dict[str, Any], layout: str) -> str | None:
    """Hash of all that the reference's log probabilities depend on: tokens, weights, adapter, types, device, layout, versions.
    None where the weights cannot be known by a name.
    """
    import torch

    plan, settings, base = ctx.plan, ctx.settings, base_of(model)
    weights = weights_identity(settings.model, getattr(base.config, "_commit_hash", None))
    if weights is None:
        return None
    device = base.device.type
    parts = [
        VERSION,
        [metadata.version(name) for name in ("torch", "transformers", "peft")],
        weights,
        _adapter(settings),
        [plan.dtype, plan.weights_dtype, settings.model.load_in_4bit, settings.model.load_in_8bit]
        + ["fp8"] * settings.model.load_in_fp8,
        settings.model.attn_implementation.value,
        [device, torch.cuda.get_device_name() if device == "cuda" else ""],
        [layout, settings.trainer.per_device_train_batch_size],  # products round by the number of rows
        {name: _hash_tokens(split) for name, split in splits.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def computed_once(key: str, make: Callable[[], LogProbs], stop: Any) -> tuple[LogProbs, str]:
    """(what is kept under `key`, `cache`), or (what `make` gives, which is kept from now on, `computed`).

    Of several runs one computes it, the others wait for it. Raises Interrupted where `stop` does.
    """
    folder = cache.cache_dir() / "references" / key
    if (found := _read_together(folder)) is not None:
        return found, "cache"
    with contextlib.ExitStack() as held:
        group.alone(_wait)(folder, held, stop)
        if (found := _read_together(folder)) is not None:
            return found, "cache"
        found = make()
        if group.is_first() and all(math.isfinite(n) for pairs in found.values() for pair in pairs for n in pair):
            _keep(folder, found)
    return found, "computed"


def _wait(folder: Path, held: contextlib.ExitStack, stop: Any) -> None:
    """Lock what will be `folder` until `held` is left."""
    lock = token_cache.only_one(folder)
    while not lock.is_locked:
        stop.check_here()
        with contextlib.suppress(Timeout):
            held.enter_context(lock.acquire(timeout=1))


def _keep(folder: Path, found: LogProbs) -> None:
    try:
        atomic.remove_leftovers(folder.parent, folder.name)
        atomic.remove_folder(folder)  # whatever is there could not be read
        with atomic.new_folder(folder, replace=False) as work:
            (work / FILE).write_text(json.dumps(found), encoding="utf-8")
    except OSError as error:  # the run has what it needs
        log.warning("The reference's log probabilities could not be kept: %s", first_line(error))


def _read_together(folder: Path) -> LogProbs | None:
    """What the first process can read."""
    return group.broadcast(_read(folder) if group.is_first() else None)


def _read(folder: Path) -> LogProbs | None:
    """What is kept; None where it is missing or damaged."""
    if atomic.find_damage(folder):
        return None
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _adapter(settings: Settings) -> Any:
    """What the reference has of the adapter: nothing of a fresh one, which adds nothing, unless it may round in another way."""
    lora = settings.lora
    own = lora.start_from or lora.use_dora or lora.modules_to_save or lora.extra
    if settings.method.reference == Reference.base or not lora.enabled or not own:
        return None
    shape = {key: value for key, value in jsonable(lora).items() if key != "start_from"}
    if not lora.start_from:
        return [shape, settings.seed]
    folder = find_adapter(lora.start_from)
    return [shape, [hash_file(folder / name) for name in FILES]]


def _hash_tokens(pairs: Any) -> str:
    """Hash of the tokens and labels of all pairs, in their order."""
    import numpy as np
    import pyarrow.compute as pc

    digest = hashlib.sha256(str(len(pairs)).encode())
    for table in pairs.select_columns(list(DPO.columns)).with_format("arrow").iter(1000):
        for name in DPO.columns:
            for numbers in (pc.list_value_length(table[name]), pc.list_flatten(table[name])):
                digest.update(np.asarray(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()
