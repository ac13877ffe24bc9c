"""Fold the adapter into the weights it was trained on, and save them in 16 or 4 bits."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft.config.lora_rules import changes_base
from sft.config.schema import ModelSettings, Settings
from sft.errors import Refusal, first_line, refuse
from sft.model.files import check_adapter_files, check_model_files
from sft.storage import atomic

OF_THE_FILE = {"_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config",
               "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"}  # fmt: skip
"""Keys of a config in which a merged model may differ from the trained one."""


def load_trained(settings: Settings, weights: Path, quantised: bool = True) -> Any:
    """The trained model, loaded afresh through transformers and PEFT: the base and `weights`, adapter/ or model/.

    `quantised=False` turns a base that was trained in 4 or 8 bits into plain layers that hold the very same values, so that
    an adapter can be folded in without being rounded to 4 bits; one that was trained in FP8 is loaded as it was before its
    weights were rounded. Raises Refusal if the base cannot be found, or the files of
    `weights` cannot be believed.
    """
    from sft.model import backend, loading
    from sft.plan.plan import plan_saved

    if not settings.lora.enabled:
        return _load_folder(weights, backend.torch_dtype(plan_saved(settings).dtype))
    import torch
    from peft import PeftModel
    from transformers import set_seed

    if not (weights / "adapter_model.safetensors").is_file():  # PEFT would take adapter_model.bin, which can run code
        raise refuse(f"run={weights.parent}", f"{weights.name}/ holds no adapter_model.safetensors.", "train it again")
    problems = check_adapter_files(weights, f"run={weights.parent}")
    if problems:
        raise Refusal(problems)
    if settings.model.load_in_fp8 and not quantised:
        settings = replace(settings, model=replace(settings.model, load_in_fp8=False))
    base, _ = loading.load_model(settings, plan_saved(settings))
    if changes_base(settings.lora):  # a checkpoint's start is taken out of the base anew, by the same random numbers
        set_seed(settings.seed)
    if not quantised and getattr(base, "is_quantized", False):
        base = base.dequantize()
    try:
        return PeftModel.from_pretrained(base, str(weights))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = f"PEFT cannot put {weights.name}/ on the model: {first_line(error)}"
        raise refuse(f"run={weights.parent}", why, "bring the files of the folder back as the run wrote them") from error


def merge(model: Any) -> Any:
    """The plain model with the adapter folded in, in the 16-bit type of its base; a model without an adapter as it is.

    Each layer is added up in float32 and rounded once: bfloat16 sums would lose small updates. One layer at a time, so
    that no second copy of the model is needed.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    stored = getattr(model.config, "dtype", None)
    dtype = torch.float16 if _stored_dtype(model) == "float16" or stored == torch.float16 else torch.bfloat16
    if hasattr(model, "peft_config"):
        _part_tied(model.get_base_model())
        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            # One that sits on a parameter and not on a layer says which.
            weight = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
            weight.data = weight.data.float()
            layer.merge(safe_merge=True)  # raises if the sum holds a value that is not a number
            weight.data = weight.data.to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            model = model.merge_and_unload(progressbar=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # the training made them two
    return model.to(dtype)


def _part_tied(model: Any) -> None:
    """Give the output layer a copy of the weight that it shares with the embeddings, where one of them has an adapter: what is
    added to the one is not the other's. The merged model is then one whose weights are not tied.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and any(isinstance(m, LoraLayer) for m in (head, embedding)):
        plain = head.get_base_layer() if isinstance(head, LoraLayer) else head
        plain.weight = torch.nn.Parameter(plain.weight.data.clone(), requires_grad=False)


def _stored_dtype(model: Any) -> str | None:
    """The type that the base's files are in, which may be narrower than the type they were loaded as."""
    config = Path(str(getattr(model.config, "_name_or_path", ""))) / "config.json"
    if not config.is_file():
        return None
    facts = json.loads(config.read_text(encoding="utf-8"))
    return facts.get("dtype") or facts.get("torch_dtype")


def save(model: Any, tokenizer: Any, stop_ids: list[int], place: Path, source: str | None = None) -> None:
    """Save a plain model with its tokenizer and the tokens that end a completion, complete or not at all.

    `source` is the folder or hub id of the base: a SentencePiece file there goes along, because llama.cpp's converter
    reads it where the architecture has one. Raises OSError on a full disk.
    """
    with atomic.new_folder(place, manifest=False) as work:
        set_stop_tokens(model, tokenizer, stop_ids)
        model.save_pretrained(work, max_shard_size="5GB")
        tokenizer.save_pretrained(work)
        vocabulary = _sentencepiece_file(source)
        if vocabulary and not (work / "tokenizer.model").exists():
            shutil.copy(vocabulary, work / "tokenizer.model")
        _name_tokenizer(model, work)


def _name_tokenizer(model: Any, place: Path) -> None:
    """Give Phi-4's tokenizer the class that its maker names: llama.cpp's converter tells it from Phi-3's by that, and
    transformers saves it under another, by which it loads the same one for this kind of model."""
    config, files = place / "tokenizer_config.json", [place / "tokenizer.json", place / "tokenizer.model"]
    if getattr(model.config, "model_type", None) != "phi3" or not files[0].is_file() or files[1].exists():
        return
    if "ByteLevel" in json.dumps(json.loads(files[0].read_text(encoding="utf-8")).get("pre_tokenizer")):
        named = {**json.loads(config.read_text(encoding="utf-8")), "tokenizer_class": "GPT2Tokenizer"}
        config.write_text(json.dumps(named, indent=2, ensure_ascii=False), encoding="utf-8")


def set_stop_tokens(model: Any, tokenizer: Any, stop_ids: list[int]) -> None:
    """Write into the model what ends a completion and what pads: readers go by these and not the tokenizer."""
    ends: Any = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    for config in (model.config.get_text_config(), model.generation_config):
        config.eos_token_id, config.pad_token_id = ends, tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def save_4bit(merged: Path, place: Path) -> None:
    """Quantise a merged 16-bit folder to nf4 and save it, complete or not at all; what is not quantised stays in 16 bits.

    The settings are QLoRA's (arXiv 2305.14314): nf4 with double quantisation. Works on a GPU and, through bitsandbytes' CPU
    kernels, without one.
    """
    from transformers import AutoTokenizer

    model = _load_folder(merged, "auto", quantise=True)
    with atomic.new_folder(place, manifest=False) as work:
        model.save_pretrained(work, max_shard_size="5GB")
        AutoTokenizer.from_pretrained(merged, trust_remote_code=False).save_pretrained(work)


def config_of(model: Any) -> dict[str, str]:
    """What a model's config says of how it computes: each key's value as JSON."""
    found = model.config.get_text_config().to_dict()
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in found.items() if key not in OF_THE_FILE}


def load_merged(folder: Path, dtype: Any) -> Any:
    """A merged folder, loaded afresh; one that was saved in 4 bits says so in its config."""
    return _load_folder(folder, dtype)


def _load_folder(folder: Path, dtype: Any, quantise: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    problems = check_model_files(folder, ModelSettings(name=str(folder)), str(folder))
    if problems:
        raise Refusal([replace(p, fix="export it again, or bring the file back as the export wrote it") for p in problems])
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    if quantise:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _sentencepiece_file(source: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if source is None:
        return None
    if Path(source).is_dir():
        found = Path(source) / "tokenizer.model"
        return found if found.is_file() else None
    if Path(source).is_absolute():  # a folder that is gone: only what was trained whole is exported without it
        return None
    cached = try_to_load_from_cache(source, "tokenizer.model")
    return Path(cached) if isinstance(cached, str) else None
