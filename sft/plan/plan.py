"""What a run does where its settings leave it open: decided here once, each with its reason.

    plan_model       before the model's tokenizer is loaded: backend, types, processes
    plan_targets     by the model's config.json: the layers that get an adapter; `plan_start` is both
    plan_training    when the rows and the model's dimensions are known: micro-batch, checkpointing, padding-free, compiled and
                     captured steps, when to evaluate and to sample
    Plan.padded      when the loaded model shows that its rows have to be padded

A preflight shows the plan, run.json records it, and what runs later is handed the plan or `closed` settings: nothing there
asks what an `auto` or a null comes to. A resumed run takes the backend, the targets and the batch plan that it began with.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sft.config.batching import (
    CPU_ROWS,
    BatchPlan,
    batch_plan_of,
    candidates,
    effective_batch_size,
    eval_rows,
    is_auto,
    planned_steps,
    with_batch_plan,
)
from sft.config.eligibility import OWN_LOSS, is_compiled, why_eager, why_padded
from sft.config.hardware import processes_of, resolve_backend
from sft.config.provenance import DEFAULT
from sft.config.schedule import with_eval_schedule
from sft.config.schema import Backend, Dtype, MethodName, Settings, Strategy
from sft.plan import families, memory
from sft.plan.machine import Machine, look

CLOSE = 0.9
"""An estimate above this share of the GPU's memory is close to it."""

WIDEST = 256
"""Values of a head up to which torch's variable-length flash attention takes it."""

PADDING_FREE_KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose padding-free rows are tried in tests/integration/test_padding_free.py."""

ROOM = 0.45
"""Share of a GPU's memory that the weights may take for `model.backend=auto` to leave Unsloth."""

TRAINED = 18.0
"""Bytes of a weight where all are trained: itself, its gradient and two moments in float32, and a copy to compute with."""


@dataclass(frozen=True)
class Plan:
    """Every open value of a run, decided."""

    backend: str = "transformers"
    """`unsloth` or `transformers`."""
    dtype: str = "float32"
    """Type that the model computes in."""
    weights_dtype: str = "float32"
    """Type that weights are kept in which are not quantised."""
    processes: int = 1
    target_modules: list[str] | None = None
    """Layers that get an adapter, where the model's family has its own; None where they are those of the settings."""
    batch: BatchPlan | None = None
    """Rows of a micro-batch, micro-batches of a step, checkpointing."""
    eval_batch_size: int = 1
    """Rows of a micro-batch of an evaluation."""
    rollout_rows: int = 0
    """Completions that are drawn together in each process, where a method draws some."""
    rollout_places: int = 0
    """Tokens that each of them has room for, its prompt included."""
    steps: int = 0
    padding_free: bool = False
    why_padded: str = ""
    fp8_transposed: bool = False
    """Whether FP8 weights are kept transposed as well, where there is room for it: the backward pass is faster then."""
    compiled: bool = False
    """Whether decoder layers are compiled."""
    captured: bool = False
    """Whether micro-batches are captured as CUDA graphs, where the host would be the slower one."""
    capture_sizes: tuple[int, ...] = ()
    """Tokens of those that are, shortest first: known when the model is loaded."""
    eval_steps: float | None = None
    """`trainer.eval_steps`: a share of all steps, or a number of them."""
    every_steps: float | None = None
    """`samples.every_steps`, in the same way."""
    keep_best: bool = True
    """`trainer.load_best_model_at_end`."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why, by the name of what was decided."""

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return bool(self.batch and self.batch.gradient_checkpointing)

    def padded(self, why: str, eval_batch_size: int) -> "Plan":
        """The plan of a model whose rows have to be padded."""
        no = dict.fromkeys(("padding_free", "compiled", "captured"), False)
        return replace(self, **no, why_padded=why, eval_batch_size=eval_batch_size)

    def speed(self) -> dict[str, Any]:
        """What run.json keeps under `speed`."""
        return {"padding_free": self.padding_free, "why_not": self.why_padded, "compiled": self.compiled,
                "lengths": list(self.capture_sizes)}  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What run.json keeps under `plan`."""
        return asdict(self)


def plan_model(
    settings: Settings,
    machine: Machine | None = None,
    config: Callable[[], dict[str, Any]] = dict,
    began: str | None = None,
) -> Plan:
    """Backend, types and processes. `config` reads the model's config.json, empty where it cannot be had; `began` is the
    backend that an earlier session of the run had.
    """
    machine = machine or look(settings)
    backend, why = _choose_backend(settings, machine, config, began)
    dtype = settings.model.dtype
    if dtype != Dtype.auto:
        kind = dtype.value
    else:
        kind = "float32" if not machine.gpu else "bfloat16" if machine.bfloat16 else "float16"
    # Where all weights are trained and no type is named, they stay float32: steps of 1e-5 are rounded away by 16 bits. Where
    # processes share the weights, accelerate makes each share float32.
    whole = not settings.lora.enabled and dtype == Dtype.auto and settings.distributed.strategy != Strategy.fsdp
    return Plan(backend, kind, "float32" if whole else kind, processes_of(settings), reasons={"backend": why})


def plan_start(
    settings: Settings,
    machine: Machine,
    config: Callable[[], dict[str, Any]],
    sources: dict[str, str],
    before: dict[str, Any] | None = None,
) -> Plan:
    """`plan_model`, then `plan_targets`. `before` is the record of an earlier session of the run, whose choices stay."""
    before = before or {}
    plan = plan_model(settings, machine, config, (before.get("model") or {}).get("backend"))
    return plan_targets(plan, settings, config, sources, before.get("plan"))


def plan_targets(
    plan: Plan,
    settings: Settings,
    config: Callable[[], dict[str, Any]],
    sources: dict[str, str],
    before: dict[str, Any] | None = None,
) -> Plan:
    """The plan with the targets of the model's family, where nobody has chosen any.

    `sources` say where each setting comes from; without them the default list counts as not chosen. `before` is the plan of an
    earlier session of the run, whose layers stay.
    """
    lora = settings.lora
    chosen = sources.get("lora.target_modules", DEFAULT) != DEFAULT or lora.target_modules != families.DEFAULT
    if before:
        names, why = [name for name in before.get("target_modules") or [] if name], "as the run began"
    else:
        names, why = families.own_targets(config()) if lora.enabled and not chosen else (None, "")
    return replace(plan, target_modules=names, reasons={**plan.reasons, "targets": why}) if names else plan


def plan_saved(settings: Settings) -> Plan:
    """How saved weights are loaded: by transformers, whatever has trained them, on the machine that is here."""
    model, preflight = replace(settings.model, backend=Backend.transformers), replace(settings.preflight, gpu=None)
    return plan_model(replace(settings, model=model, preflight=preflight))


def _choose_backend(
    settings: Settings, machine: Machine, config: Callable[[], dict[str, Any]], began: str | None
) -> tuple[str, str]:
    """The backend and why. On a GPU with Unsloth installed the choice is between it and transformers with padding-free rows,
    which is several times faster (docs/benchmarks.md) but keeps more in memory.
    """
    if settings.model.backend != Backend.auto:
        return settings.model.backend.value, "as set"
    if began in {backend.value for backend in Backend} - {"auto"}:
        return began, "as the run began"
    backend = resolve_backend(settings)
    if backend != "unsloth":
        return backend, "Unsloth cannot be used here"
    if _has_room(settings, machine, config()):
        return "transformers", "padding-free rows are faster, and the weights leave room for what they keep"
    return "unsloth", "it keeps least in memory"


def _has_room(settings: Settings, machine: Machine, config: dict[str, Any]) -> bool:
    """Whether rows can be padding-free, and the weights leave enough of the GPU for what these keep."""
    if why_padded(settings, "transformers") or settings.trainer.gradient_checkpointing or not machine.varlen:
        return False
    if config.get("model_type") not in PADDING_FREE_KINDS:
        return False
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    wide = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * wide * (heads + config.get("num_key_value_heads", heads))
    layers = config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])
    ends = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    each = 2.0 if settings.lora.enabled else TRAINED
    model = settings.model
    packed = 0.57 if model.load_in_4bit else 1.0 if model.load_in_8bit or model.load_in_fp8 else each
    return layers * packed + ends * each <= ROOM * (machine.total_gib or 0) * 2**30


def plan_training(
    plan: Plan,
    settings: Settings,
    machine: Machine,
    dims: memory.ModelDims | None,
    facts: dict[str, Any] | None,
    lengths: dict[str, list[int]],
    *,
    began: BatchPlan | None = None,
) -> Plan:
    """The rest of `plan`. `facts` are those of the prepared data and `lengths` the tokens of each row by split; both are empty
    where the data was refused. `began` is the batch plan of an earlier session of the run.
    """
    trainer = settings.trainer
    rows = facts["rows"]["train"] if facts else 1
    steps = planned_steps(trainer, rows, settings.method.num_iterations)
    why = why_padded(settings, plan.backend)
    if not why and machine.gpu and not machine.varlen:
        why = "the GPU has no attention kernel for rows of various lengths (compute capability 8.0 or higher)"
    if not why and machine.gpu and plan.dtype == "float32":
        why = "attention over rows of various lengths needs 16 bits on a GPU"
    why = why or (dims.why_padded if dims else "")
    if not why and machine.gpu and dims and dims.widest_head > WIDEST:
        why = f"its heads of {dims.widest_head} values are wider than attention over rows of various lengths takes on a GPU"
    tokens = steps * effective_batch_size(trainer) * sum(lengths["train"]) / rows if facts else 0
    compiled = not why and bool(trainer.torch_compile or (machine.gpu and is_compiled(trainer, tokens)))
    captured = not why and machine.gpu and trainer.cuda_graphs is not False and not why_eager(settings)
    plan = replace(plan, steps=steps, padding_free=not why, why_padded=why, compiled=compiled, captured=captured)
    plan = replace(plan, **_plan_rollouts(plan, settings, lengths))
    reused = _reusable(began, plan)
    batch = reused or _plan_batch(plan, settings, machine, dims, lengths.get("train", []))
    if batch.gradient_checkpointing is None:
        batch = replace(batch, gradient_checkpointing=machine.gpu)
    many = lengths.get("eval") if plan.padding_free and machine.gpu else None
    plan = replace(plan, batch=batch, eval_batch_size=eval_rows(trainer, _array(many), plan.processes))
    if settings.model.load_in_fp8 and dims and machine.free_gib:
        plan = replace(plan, fp8_transposed=_fits_transposed(plan, settings, machine, dims, lengths.get("train", [])))
    chosen = ("the fastest that fits" if plan.padding_free else "as many rows as fit") if is_auto(trainer) else "as set"
    reasons = {**plan.reasons, "batch": "as the run began" if reused else chosen,
               "padding_free": why or "the model's attention is tried when it is loaded"}  # fmt: skip
    if not facts:
        return replace(plan, reasons=reasons)
    scheduled = with_eval_schedule(settings, facts)
    keep = scheduled.trainer.load_best_model_at_end
    return replace(plan, eval_steps=scheduled.trainer.eval_steps, every_steps=scheduled.samples.every_steps, keep_best=keep,
                   reasons=reasons)  # fmt: skip


def _plan_rollouts(plan: Plan, settings: Settings, lengths: dict[str, list[int]]) -> dict[str, int]:
    """How many completions are drawn together, those of a step, and how long they can be. `lengths` are of prompts with all
    their completions.
    """
    method = settings.method
    if method.name != MethodName.grpo:
        return {}
    prompts = -(-effective_batch_size(settings.trainer) // plan.processes)
    longest = (
        max((max(some) for some in lengths.values() if some), default=0) - method.num_generations * method.max_completion_length
    )
    places = (longest or settings.model.max_seq_length) + method.max_completion_length
    return {"rollout_rows": prompts * method.num_generations, "rollout_places": min(places, settings.model.max_seq_length)}


def _reusable(began: BatchPlan | None, plan: Plan) -> BatchPlan | None:
    """The batch plan that a run began with, unless it was decided for another number of processes."""
    return began if began and began.gradient_accumulation_steps % plan.processes == 0 else None


def _plan_batch(
    plan: Plan, settings: Settings, machine: Machine, dims: memory.ModelDims | None, lengths: list[int]
) -> BatchPlan:
    """As set, or for `auto` the most rows that fit; with padding-free rows, checkpointing only if it is needed."""
    trainer = settings.trainer
    choices = candidates(trainer, plan.processes) if is_auto(trainer) else [trainer.per_device_train_batch_size]
    if dims is None or machine.free_gib is None:
        rows = next((n for n in choices if n <= CPU_ROWS), choices[-1]) if is_auto(trainer) else None
        return batch_plan_of(trainer, rows, trainer.gradient_checkpointing)
    load = load_plan_of(settings, plan, machine)
    if not is_auto(trainer) and not load.padding_free:
        return batch_plan_of(trainer, checkpointing=trainer.gradient_checkpointing)
    return memory.fitting_batch_plan(dims, settings, load, lengths, CLOSE * machine.free_gib, choices)[0]


def _fits_transposed(plan: Plan, settings: Settings, machine: Machine, dims: memory.ModelDims, lengths: list[int]) -> bool:
    """Whether the run fits with its FP8 weights kept transposed as well, captured steps included."""
    load = load_plan_of(settings, replace(plan, fp8_transposed=True), machine)
    rows = plan.batch.per_device_train_batch_size if plan.batch else 1
    guess = memory.estimate(dims, load, *memory.largest(load, rows, memory.longest_rows(lengths, settings)))
    return guess.needed + guess.recorded <= CLOSE * (machine.free_gib or 0)


def load_plan_of(settings: Settings, plan: Plan, machine: Machine) -> memory.LoadPlan:
    """How a plan loads and trains the model, for the estimate of its memory; by the settings before a batch is planned."""
    model, trainer = settings.model, settings.trainer
    kwargs = trainer.extra.get("gradient_checkpointing_kwargs") or {}
    wanted = plan.batch.gradient_checkpointing if plan.batch else trainer.gradient_checkpointing
    every = plan.batch.every_n_layers if plan.batch else 1
    padded = plan.backend == "transformers" and not plan.padding_free
    return memory.LoadPlan(
        backend=plan.backend,
        bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else 32 if plan.dtype == "float32" else 16,
        fp8=(1 + plan.fp8_transposed) * model.load_in_fp8,
        full=not settings.lora.enabled,
        adapter_bytes=2 if not settings.lora.enabled and model.dtype in (Dtype.bfloat16, Dtype.float16) else 4,
        checkpointing=machine.gpu if wanted is None else wanted,
        optim=trainer.optim,
        dropout=settings.lora.enabled and settings.lora.lora_dropout > 0,
        eager=model.attn_implementation.value == "eager",
        padding_free=plan.padding_free and machine.gpu,
        compiled=plan.compiled and machine.gpu,
        padded=padded,
        chunked=padded and settings.method.name == MethodName.sft and not any(trainer.extra.get(key) for key in OWN_LOSS),
        # One layer of several also where trainer.extra says so, and nothing was decided.
        every_n_layers=every if every > 1 else kwargs.get("every_n_layers", 1),
        rollout_tokens=plan.rollout_rows * plan.rollout_places,
    )


def with_model_plan(settings: Settings, plan: Plan) -> Settings:
    """The settings with the backend and the targets that were decided for."""
    lora = replace(settings.lora, target_modules=list(plan.target_modules)) if plan.target_modules else settings.lora
    return replace(settings, model=replace(settings.model, backend=Backend(plan.backend)), lora=lora)


def closed(settings: Settings, plan: Plan) -> Settings:
    """The settings with what was decided in place of `auto` and null."""
    settings = with_batch_plan(with_model_plan(settings, plan), plan.batch)
    trainer = replace(settings.trainer, eval_steps=plan.eval_steps, load_best_model_at_end=plan.keep_best)
    return replace(settings, trainer=trainer, samples=replace(settings.samples, every_steps=plan.every_steps))


def _array(lengths: list[int] | None) -> Any:
    import numpy as np

    return None if lengths is None else np.asarray(lengths)
