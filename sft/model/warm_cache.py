"""What runs of one process have in common: loaded once, and handed to each run as if it were fresh.

Outside of a sweep every function only loads. In a sweep the frozen model, the adapter it began with, the tokenizer and the
tokens stay, as long as the next job asks for the same; on a GPU so do the steps that were captured with that adapter. What the
untrained model gives, its held-out loss and its completions, is the same for all and taken once. A model is
handed out again only if it is provably what it was: its modules are put back as they stood, its adapter's weights are
written back, and any other weight that was written to or replaced means that it is loaded again.
"""

import copy
import gc
import json
import logging
import random
from collections.abc import Callable
from typing import Any

from sft import environment
from sft.config import fingerprint
from sft.config.schema import Settings
from sft.data import prepare, token_cache
from sft.model import adapters, loading
from sft.model import tokenizer as model_tokenizer
from sft.plan.plan import Plan
from sft.storage import jsonio

log = logging.getLogger(__name__)

_keeping = _frozen = False

_kept: dict[str, tuple[str, Any]] = {}

KEPT = ("model", "adapter", "tokenizer", "tokens", "check", "captured_steps", "evaluation", "completions", "reference")

loads = dict.fromkeys(KEPT, 0)
"""How often each was loaded or made in this process."""

OF_MODEL = ("model", "adapter", "check", "captured_steps", "evaluation", "completions", "reference")
"""What goes when another model is loaded."""


def keep(on: bool) -> None:
    """Keep what is loaded for the next run (True), or forget it and keep nothing (False)."""
    global _keeping
    _keeping = on
    if not on:
        _forget(*loads)


def load_tokenizer(settings: Settings) -> tuple[Any, set[int]]:
    """`models.load_tokenizer`, once for all runs with the same model settings and variables of its chat template."""
    model, variables = settings.model, settings.dataset.chat_template_kwargs
    return _once("tokenizer", _key(model, variables), lambda: model_tokenizer.load_tokenizer(model, variables))


def prepare_data(settings: Settings, tokenizer: Any, stop_ids: set[int]) -> token_cache.Prepared:
    """`data.prepare`, once for all runs with the same rows and the same tokenizer."""
    key = _key(settings.model, settings.dataset, fingerprint.row_seed(settings), fingerprint.format_hash(settings.dataset))
    prepared = _once("tokens", key, lambda: prepare.prepare(settings, tokenizer, stop_ids))
    return token_cache.Prepared(prepared.train, prepared.eval, dict(prepared.facts))


def load_model(settings: Settings, plan: Plan, loss_of: Callable[[Any], float | None] | None = None) -> tuple[Any, str]:
    """`models.load_model`, once for all runs with the same model settings, where that can be proven clean.

    Full fine-tuning writes to the weights, quantised weights are cast in place, and Unsloth patches what it loads: these
    are loaded anew for every run.
    """
    shareable = _keeping and settings.lora.enabled and plan.backend == "transformers"
    shareable = shareable and not (settings.model.load_in_4bit or settings.model.load_in_8bit)
    key = _key(settings.model, plan.backend)
    kept_key, base = _kept.get("model", ("", None))
    if base is not None:
        changed = base.restore() if shareable and kept_key == key else "another model is requested"
        if not changed:
            return base.model, base.source
        log.debug("The model is loaded again: %s", changed)
        del base
        _forget(*OF_MODEL)  # first, so that two models are never in memory together
    loads["model"] += 1
    model, source = loading.load_model(settings, plan, loss_of)
    if shareable:
        _kept["model"] = (key, Base(model, source))
    return model, source


def attach_adapter(model: Any, settings: Settings, plan: Plan) -> Any:
    """`lora.attach`; a model that is kept comes back with the adapter it was given before, as that one was at first, where the
    next run begins with the same one. The random state is then what it was after it had been made.
    """
    if "model" not in _kept or _kept["model"][1].model is not model:
        return adapters.attach(model, settings, plan)
    key = _key(settings.lora, settings.seed)
    kept_key, adapted = _kept.get("adapter", ("", None))
    if adapted is not None and kept_key == key and not adapted.restore():
        _set_random_state(adapted.random_state)
        return adapted.model
    if adapted is not None:
        _drop_adapter()
        _kept["model"][1].restore()  # the attempt above has put the old adapter's layers back
    loads["adapter"] += 1
    model = adapters.attach(model, settings, plan)
    _kept["adapter"] = (key, Adapted(model))
    return model


def checked(model: Any, settings: Settings, rows: list[Any], check: Callable[[], Any]) -> Any:
    """What `check()` found of a kept model with such an adapter and these rows; else what it finds now."""
    kept = "adapter" in _kept and _kept["adapter"][1].model is model
    return _once("check", _key(settings.model, settings.lora, rows), check) if kept else check()


def captured_steps(model: Any, settings: Settings, what: Any, make: Callable[[], Any]) -> Any:
    """The captured steps of a kept model with this very adapter, made as `what` says; else what `make` gives."""
    if "adapter" not in _kept or _kept["adapter"][1].model is not model:
        return make()
    keeps, (kept_key, found) = keeps_captured_steps(settings), _kept.get("captured_steps", ("", None))
    if found is not None and not (keeps and kept_key == _key(what) and found.lengths):  # of another kind, or given up
        _kept.pop("captured_steps")[1].forget()
    return _once("captured_steps", _key(what), make) if keeps else make()


def of_base(name: str, model: Any, settings: Settings, what: Any, make: Callable[[], Any]) -> Any:
    """What `make()` finds (`evaluation`, `completions`) with a kept model whose adapter is untrained: found once for all
    runs with the same `what`, whatever their ranks and rates, because such an adapter adds nothing. Else what it finds now.

    DoRA's magnitudes and copied modules round in other ways than the model alone; an adapter that was trained before, or that
    PEFT starts in a way of its own, may add something; a run with a time limit has to measure.
    """
    lora, trainer = settings.lora, settings.trainer
    own = lora.use_dora or lora.modules_to_save or lora.start_from or lora.extra or trainer.max_hours or trainer.stop_at
    kept = "adapter" in _kept and _kept["adapter"][1].model is model
    return _once(name, _key(settings.model, what), make) if kept and not own else make()


def keeps_captured_steps(settings: Settings) -> bool:
    """Whether captured steps stay when a run ends; an export, in a process of its own, needs the memory."""
    return _keeping and not settings.export.formats


def release() -> None:
    """After a run: take its adapter off the kept model, and free the memory of all that was the run's own.

    What is left after the first run of several, the imported libraries above all, is not searched again when garbage is
    collected: that takes half a second a job.
    """
    global _frozen
    if "model" in _kept and (changed := _kept["model"][1].restore()):
        log.debug("The model is not kept: %s", changed)
        _forget(*OF_MODEL)
    environment.release_memory()
    if _keeping and not _frozen:  # gc.get_freeze_count() says nothing: Python 3.12 begins with 375
        gc.freeze()
        _frozen = True


def freeze() -> None:
    """Do not search for garbage among all that there is by now, until `thaw`: after the imports of a run these are the
    libraries, after its first steps what the compiler has left. To search them takes half a second.
    """
    if not _frozen:
        gc.freeze()


def thaw() -> None:
    """Search for garbage everywhere again, but among what a sweep keeps."""
    if not _frozen:
        gc.unfreeze()


def _drop_adapter() -> None:
    """Let go of the adapter and of what was captured with it. Their circles of references are opened by hand: to have the
    garbage collector search for them among all that is kept takes seconds.
    """
    if "captured_steps" in _kept:
        _kept.pop("captured_steps")[1].forget()
    stays = {id(module) for module, _ in _kept["model"][1].modules}
    for module, state in _kept.pop("adapter")[1].modules:
        if id(module) not in stays:
            module.__dict__.clear()
            state.clear()


def _forget(*names: str) -> None:
    """Let go of what was kept under these names."""
    global _frozen
    for name in names:
        _kept.pop(name, None)
    gc.unfreeze()  # else its circles of references would stay for ever
    _frozen = False
    environment.release_memory()


class Base:
    """A loaded model and how it stood when it was loaded."""

    def __init__(self, model: Any, source: str):
        self.model, self.source = model, source
        self.start: dict[str, Any] = {}
        """Values that are written back to the weights of these names."""
        self.modules = [(module, _copied(module.__dict__)) for module in model.modules()]
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._weights = {name: _mark(tensor) for name, tensor in _tensors(model)}
        self._configs = [(config, copy.deepcopy(config.__dict__)) for config in _configs(model)]

    def restore(self) -> str:
        """Put every module back as it was when loaded; returns what could not be put back, or an empty text.

        An adapter, a hook, a patched forward or a flag is an entry of a module's __dict__, so all of them go with it. PEFT's
        `unload` takes off its own layers alone, and an adapter made anew has other memory than that of captured steps.
        """
        for module, state in self.modules:
            module.__dict__.clear()
            module.__dict__.update(_copied(state))
        for config, state in self._configs:
            if config.__dict__ != state:
                config.__dict__.clear()
                config.__dict__.update(copy.deepcopy(state))
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
            parameter.grad = None
        tensors = dict(_tensors(self.model))
        changed = [name for name, mark in self._weights.items() if name not in tensors or self._differs(name, mark, tensors)]
        if changed:
            return f"{changed[0]} was written to"
        for name, values in self.start.items():
            tensors[name].data.copy_(values)
        return ""

    def _differs(self, name: str, mark: tuple, tensors: dict[str, Any]) -> bool:
        now = _mark(tensors[name])
        return now[1:] != mark[1:] if name in self.start else now != mark


class Adapted(Base):
    """A model with an adapter that nothing has trained yet, and the random state at that moment."""

    def __init__(self, model: Any):
        super().__init__(model, "")
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.random_state = _random_state()


def _tensors(model: Any):
    yield from model.named_parameters()
    yield from model.named_buffers()


def _mark(tensor: Any) -> tuple:
    """Changes when a tensor's memory, form or values do: torch counts every write in place in `_version`."""
    hooks = len(tensor._backward_hooks or ())
    return tensor._version, id(tensor), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), hooks


def _random_state() -> tuple:
    import numpy as np
    import torch

    return random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _set_random_state(state: tuple) -> None:
    import numpy as np
    import torch

    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    torch.cuda.set_rng_state_all(state[3])


def _configs(model: Any) -> list[Any]:
    found = (getattr(model, "config", None), getattr(model, "generation_config", None))
    return [config for config in found if config is not None]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A module's __dict__ with its own tables (children, hooks, ...) copied, and everything else as it is."""
    return {key: copy.copy(value) if isinstance(value, (dict, list, set)) else value for key, value in state.items()}


def _once(name: str, key: str, load: Any) -> Any:
    kept_key, value = _kept.get(name, ("", None))
    if value is None or kept_key != key:
        loads[name] += 1
        value = load()
        if _keeping:
            _kept[name] = (key, value)
    return value


def _key(*parts: Any) -> str:
    return json.dumps(jsonio.jsonable(list(parts)), sort_keys=True)
