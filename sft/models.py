"""The tokenizer, the model and its backend: found, checked and loaded."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import embedded, strategy
from sft.batch import why_padded
from sft.errors import Problem, Refusal, first_line, is_page, refuse
from sft.memory import CAPACITY, CONTEXT, within_limit
from sft.model_files import INDEX, check_model_files
from sft.rows import hub_unreachable
from sft.runtime import hub_reachable
from sft.settings import Attention, Backend, Dtype, Gpu, ModelSettings, Settings
from sft.validate import pickle_problem, resolve_backend

log = logging.getLogger(__name__)

# ChatML with every turn closed by <|im_end|>; for base models that bring no chat template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Tokens that model makers reserve and never train; the first one present becomes the padding of a tokenizer without any.
UNUSED_TOKENS = ["<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>"]


FLAT_KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose rows were laid end to end in tests/integration/test_flat.py."""
ROOM = 0.45
"""Share of a GPU's memory that the weights may take."""
TRAINED = 18.0
"""Bytes of a weight where all are trained: itself, its gradient and two moments in float32, and a copy to compute with."""


def import_backend(settings: Settings) -> str:
    """Import the backend before anything else touches transformers or TRL (Unsloth patches both), and name it."""
    backend = resolve_backend(settings)
    if backend == "unsloth":
        import unsloth  # noqa: F401
    return backend


def settle_backend(settings: Settings) -> Settings:
    """The settings with a backend's name in place of `model.backend=auto`; imports torch.

    On a GPU with Unsloth installed the choice is between it and transformers with rows end to end, which is several times
    faster (docs/benchmarks.md) but keeps more in memory: transformers where the model is of a kind that was tried and leaves
    room.
    """
    backend = resolve_backend(settings)
    if settings.model.backend == Backend.auto and backend == "unsloth" and _has_room(settings):
        backend = "transformers"
    return replace(settings, model=replace(settings.model, backend=Backend(backend)))


def has_kernel(settings: Settings) -> bool:
    """Whether the GPU that is trained on has attention for rows of various lengths: compute capability 8.0 or higher."""
    if settings.preflight.gpu:
        return settings.preflight.gpu != Gpu.t4
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _has_room(settings: Settings) -> bool:
    """Whether rows can lie end to end, and the weights leave enough of the GPU for them."""
    if why_padded(settings, "transformers") or settings.trainer.gradient_checkpointing or not has_kernel(settings):
        return False
    config = _read_config(settings.model)
    if config.get("model_type") not in FLAT_KINDS:
        return False
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    wide = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * wide * (heads + config.get("num_key_value_heads", heads))
    layers = config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])
    ends = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    each = 2.0 if settings.lora.enabled else TRAINED
    packed = 0.57 if settings.model.load_in_4bit else 1.0 if settings.model.load_in_8bit else each
    if settings.preflight.gpu:
        capacity = CAPACITY[settings.preflight.gpu]
    else:
        import torch

        capacity = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return layers * packed + ends * each <= ROOM * within_limit(settings, capacity) * 2**30


def limit_memory(settings: Settings) -> None:
    """Let torch take no more of this process's GPU than `trainer.max_memory_gib`, what CUDA itself takes included."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        limit = settings.trainer.max_memory_gib
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - CONTEXT) / total) if limit else 1.0)


def _read_config(model: ModelSettings) -> dict[str, Any]:
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
    config = _read_config(model)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def locate(model: ModelSettings, weights: bool = True) -> tuple[str, str]:
    """Where to load from, as (folder or hub id, source for the record).

    In this order: a local folder; the hub, if it can be reached or already has the model in its cache; the copy that
    comes with the project. `weights=False` is enough for the tokenizer.
    """
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        return str(folder.absolute()), f"local folder {folder.resolve()}"  # PEFT writes the first into adapter_config.json
    if model.name != embedded.TINY_RANDOM and _hub_has(model):
        return model.name, f"hub {model.name}" + (f" at {model.revision}" if model.revision else "")
    local = embedded.local_model(model.name, weights)
    if local is None:
        return model.name, f"hub {model.name}"  # loading it raises, with the reason
    return str(local), f"embedded {local.name}"


def load_tokenizer(model: ModelSettings) -> tuple[Any, set[int]]:
    """The tokenizer with a padding token that is not its EOS, and the ids that end an answer.

    Raises Refusal if it cannot be reached, has no EOS, or gives no character offsets, and for model files that cannot be
    believed (sft/model_files.py).
    """
    from transformers import AutoTokenizer, GenerationConfig

    where, _ = locate(model, weights=False)
    problems = check_model_files(_files_of(where, model), model)
    if problems:
        raise Refusal(problems)
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with _loading(model):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if not tokenizer.is_fast:
        raise refuse(f"model.name={model.name}", "Its tokenizer is a slow one, which cannot say which token stands where.")
    if model.chat_template:
        tokenizer.chat_template = _read_chat_template(model.chat_template)
    if tokenizer.eos_token_id is None:
        raise refuse(f"model.name={model.name}", "Its tokenizer has no end-of-text token, so the model could never stop.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in UNUSED_TOKENS if t in known and t != tokenizer.eos_token), tokenizer.eos_token)
    tokenizer.padding_side = "right"
    stop_ids = {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(where, revision=model.revision).eos_token_id
        stop_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
    except OSError:
        pass  # a model without generation settings stops at its tokenizer's EOS
    return tokenizer, stop_ids


def _files_of(where: str, model: ModelSettings) -> Path:
    """The folder of a model's files: a local one, or the hub's copy, whose small files are fetched for this."""
    from huggingface_hub import hf_hub_download

    folder = Path(where)
    for name in () if folder.is_dir() else (INDEX, "generation_config.json", "config.json"):
        with contextlib.suppress(Exception):  # what cannot be had is said by loading, in more words
            folder = Path(hf_hub_download(where, name, revision=model.revision)).parent
    return folder


def load_model(settings: Settings, backend: str) -> tuple[Any, str]:
    """The model in memory, on the GPU where there is one, and the source of its weights for the record."""
    model = settings.model
    where, source = locate(model)
    if Path(where).is_dir() and (problems := check_model_files(Path(where), model)):
        raise Refusal(problems)
    with _loading(model):
        loaded = _load_unsloth(settings, where) if backend == "unsloth" else _load_transformers(settings, where)
    commit = getattr(loaded.config, "_commit_hash", None)
    return loaded, f"{source} at {commit}" if commit and source.startswith("hub") else source


def uses_checkpointing(settings: Settings) -> bool:
    """Whether activations are recomputed: as set, or only where a GPU's memory is the limit."""
    import torch

    wanted = settings.trainer.gradient_checkpointing
    return torch.cuda.is_available() if wanted is None else wanted


def unsloth_checkpointing(settings: Settings) -> str | bool:
    """The same for Unsloth, whose own kind also moves activations to the CPU's memory while they wait."""
    return "unsloth" if uses_checkpointing(settings) else False


def torch_dtype(model: ModelSettings) -> Any:
    """The torch type that `model.dtype` comes to on this machine."""
    import torch

    if model.dtype != Dtype.auto:
        return getattr(torch, model.dtype.value)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def weights_in_float32(settings: Settings) -> bool:
    """Whether the weights are kept in float32 and computed with in another type.

    So they are where all of them are trained and `model.dtype` names no type: steps of 1e-5 are rounded away by 16 bits.
    Adapters are kept in float32 as well. Where processes share the weights, accelerate makes each share float32.
    """
    return not settings.lora.enabled and settings.model.dtype == Dtype.auto and not strategy.shards(settings)


def _load_unsloth(settings: Settings, where: str) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model = settings.model
    options: dict[str, Any] = {}
    if model.attn_implementation != Attention.auto:
        options["attn_implementation"] = model.attn_implementation.value
    if weights_in_float32(settings) and torch_dtype(model) != torch.float32:  # an option that it has on GPUs alone
        options["float32_mixed_precision"] = True
    loaded, _ = FastLanguageModel.from_pretrained(
        model_name=where,
        revision=model.revision,
        max_seq_length=model.max_seq_length,
        dtype=torch_dtype(model),
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        full_finetuning=not settings.lora.enabled,
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,  # as in _load_transformers
        use_gradient_checkpointing=unsloth_checkpointing(settings),
        **options,
    )
    return loaded


def _load_transformers(settings: Settings, where: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = settings.model
    # Weights in Python's own format can run code when they are read; safetensors cannot.
    dtype = torch.float32 if weights_in_float32(settings) else torch_dtype(model)
    options: dict[str, Any] = {"dtype": dtype, "revision": model.revision, "use_safetensors": True}
    if model.attn_implementation != Attention.auto:
        options["attn_implementation"] = model.attn_implementation.value
    if model.load_in_4bit and "bnb-4bit" not in where:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype(model),
        )
    if model.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if torch.cuda.is_available() and not strategy.shards(settings):  # else each process takes its share from main memory
        options["device_map"] = {"": torch.cuda.current_device()}  # each process has its own
    return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=model.trust_remote_code, **options)


def _read_chat_template(value: str) -> str:
    if value == "chatml":
        return CHATML
    if "{" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise refuse(
            f"model.chat_template={value}", "Neither chatml, nor Jinja text, nor a file.", "model.chat_template=chatml"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"model.chat_template={value}", f"The file cannot be read: {first_line(error)}") from error


@contextlib.contextmanager
def _loading(model: ModelSettings) -> Iterator[None]:
    """Turn what transformers raises where a model cannot be had into a Refusal."""
    try:
        yield
    except OSError as error:
        raise _load_failed(model, error) from error
    except ValueError as error:
        if is_page(error) and not Path(model.name).expanduser().is_dir():
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
    if "gated" in text.lower() or "401" in text or "403" in text:
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
    if model.name != embedded.SMOLLM2:
        return True  # there is no other copy; loading says what is wrong
    try:
        hf_hub_download(model.name, "config.json", revision=model.revision)
    except Exception as error:  # whatever keeps the hub's copy away, the packaged one is here
        log.warning("The hub's copy of %s cannot be had (%s); taking the packaged one.", model.name, type(error).__name__)
        return False
    return True
