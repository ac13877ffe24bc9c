"""Put the adapter on the model, under PEFT's names."""

import difflib
from typing import Any

from sft.config.schema import LoraSettings, Settings
from sft.errors import Problem, Refusal
from sft.model.backend import unsloth_checkpointing
from sft.plan.plan import Plan

ALL_LINEAR = "all-linear"


def attach(model: Any, settings: Settings, plan: Plan) -> Any:
    """The model with a LoRA adapter; the model itself with every weight trainable if `lora.enabled` is false.

    The adapter starts from `seed` in both backends, so they start from the same weights.
    Raises Refusal as `check_modules` finds problems: the last word where sft/preflight/checks.py had no model to ask.
    """
    lora = settings.lora
    if not lora.enabled:
        model.requires_grad_(True)
        return model
    problems, _ = check_modules(model, lora)
    if problems:
        raise Refusal(problems)
    targets: str | list[str] = ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else list(lora.target_modules)
    options = {
        "r": lora.r,
        "lora_alpha": int(lora.lora_alpha) if float(lora.lora_alpha).is_integer() else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "bias": lora.bias.value,
        "use_rslora": lora.use_rslora,
        "modules_to_save": list(lora.modules_to_save) or None,
    }
    if plan.backend == "unsloth":
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            use_gradient_checkpointing=unsloth_checkpointing(plan.checkpointing),
            random_state=settings.seed,
            max_seq_length=settings.model.max_seq_length,
            **options,
        )
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    if settings.model.load_in_4bit or settings.model.load_in_8bit:
        _freeze_quantized(model, plan.checkpointing)
    set_seed(settings.seed)
    # Trained copies of tied layers stay one, as in the model itself; two would differ, and a merge could keep only one.
    tied = bool({"embed_tokens", "lm_head"} & set(lora.modules_to_save)) and model.config.tie_word_embeddings
    config = LoraConfig(task_type="CAUSAL_LM", use_dora=lora.use_dora, ensure_weight_tying=tied, **options)
    return get_peft_model(model, config)


def _freeze_quantized(model: Any, checkpointing: bool) -> None:
    """Ready a 4-bit or 8-bit model for training.

    In bfloat16 everything else stays as it is: PEFT's own preparation makes the norms, the embeddings and the output layer
    float32, 4 GB more for a vocabulary of 128,256 and a slower loss. float16, whose range is small, is left to PEFT.
    """
    import torch
    from peft import prepare_model_for_kbit_training

    if model.dtype != torch.bfloat16:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return
    model.requires_grad_(False)
    if checkpointing:
        model.enable_input_require_grads()


def check_modules(model: Any, lora: LoraSettings) -> tuple[list[Problem], list[str]]:
    """(problems, warnings) of the modules that `lora` names, by the names and kinds of a model's modules, which may be on the
    meta device. Names are matched as PEFT matches them.
    """
    problems, warnings = [*_check_targets(model, lora.target_modules), *_check_saved(model, lora.modules_to_save)], []
    if not problems and lora.target_modules != [ALL_LINEAR]:
        # PEFT gives no adapter to what is trained whole, and fails where that leaves none.
        saved = _whole(model, lora.modules_to_save)
        idle = [t for t in lora.target_modules if all(_lies_in(n, saved) for n in _named(model, t))]
        whole = f"lora.modules_to_save={_list(lora.modules_to_save)}"
        if idle and len(idle) < len(lora.target_modules):
            warnings.append(f"{', '.join(idle)} of lora.target_modules get no adapter: {whole} trains all of that.")
        elif idle:
            why = f"No layer is left for the adapter: {whole} trains all of {', '.join(idle)}."
            problems.append(Problem(f"lora.target_modules={_list(idle)}", why, "lora.modules_to_save=[]"))
    return problems, warnings


def _check_targets(model: Any, targets: list[str]) -> list[Problem]:
    if targets == [ALL_LINEAR]:
        return []
    what, problems, linear = f"lora.target_modules={_list(targets)}", [], _linear(model)
    if ALL_LINEAR in targets:
        why = "all-linear stands alone, for every linear layer but the output one; beside it others are named one by one."
        listed = [n for t in targets for n in (_linear(model, output=False) if t == ALL_LINEAR else [t])]
        return [Problem(what, why, _override("target_modules", listed))]
    missing = [t for t in targets if not _named(model, t)]
    if missing:
        close = [n for t in missing for n in difflib.get_close_matches(t, linear, 1, 0.7)]
        why = f"The model has no layer named {', '.join(missing)}. Its linear layers are: {', '.join(linear)}."
        why += f" Did you mean {', '.join(close)}?" if close else ""
        better = [n for t in targets for n in (difflib.get_close_matches(t, linear, 1, 0.7) if t in missing else [t])]
        fitting = better if len(close) == len(missing) else [ALL_LINEAR]
        problems.append(Problem(what, why, _override("target_modules", fitting)))
    unfit = {t: _linear(model, t) for t in targets if any(not _takes_adapter(m) for m in _named(model, t).values())}
    if unfit:
        listed = [f"{t} is a block of {', '.join(inner)}" if inner else f"{t} is no linear layer" for t, inner in unfit.items()]
        why = f"An adapter sits on single layers: {'; '.join(listed)}."
        why += "" if any(unfit.values()) else f" The linear layers are: {', '.join(linear)}."
        better = [n for t in targets if t not in missing for n in unfit.get(t, [t])]
        problems.append(Problem(what, why, _override("target_modules", better or [ALL_LINEAR])))
    return problems


def _check_saved(model: Any, names: list[str]) -> list[Problem]:
    import torch

    what, problems = f"lora.modules_to_save={_list(names)}", []
    known = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters())}
    plain = [n for n, m in known.items() if not isinstance(m, (torch.nn.ModuleList, torch.nn.ModuleDict))]
    last = list(dict.fromkeys(n.rpartition(".")[2] for n in plain if n))
    for name in names:
        found = [n for n, _ in model.named_modules() if n.endswith(name)]
        if found and all(n in plain for n in found):
            continue
        close = difflib.get_close_matches(name, last, 1, 0.5) if not found else []
        if not found:
            why = f"The model has no module named {name}, so that it would train nothing. "
            why += f"Did you mean {close[0]}?" if close else f"Its modules are: {', '.join(last)}."
        elif any(n in known for n in found):
            why = f"{name} is a list of modules, which cannot be trained as one."
        else:
            why = f"{name} has no weights to train."
        better = [n for m in names for n in (close if m == name else [m])]
        problems.append(Problem(what, why, _override("modules_to_save", better)))
    return problems


def _takes_adapter(module: Any) -> bool:
    """Whether PEFT has an adapter for a layer of this kind (`dispatch_default` in its tuners/lora/layer.py); quantised layers
    are known by their name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, (*kinds, torch.nn.MultiheadAttention)) or "linear" in type(module).__name__.lower()


def _linear(model: Any, inside: str = "", output: bool = True) -> list[str]:
    """Last names of the linear layers, in the model's order: of those in modules named `inside`, and with the output layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    blocks, head = list(_named(model, inside)) if inside else [], model.get_output_embeddings()
    names = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if (isinstance(module, (torch.nn.Linear, Conv1D)) or "linear" in type(module).__name__.lower())
        and (not inside or _lies_in(name, blocks))
        and (output or module is not head)
    ]
    return list(dict.fromkeys(names))


def _named(model: Any, target: str) -> dict[str, Any]:
    """The modules that PEFT takes for an entry of `target_modules`."""
    return {name: m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")}


def _whole(model: Any, names: list[str]) -> list[str]:
    """Names of the modules that `lora.modules_to_save` trains, the other of two that share their weight included."""
    saved = [n for n, _ in model.named_modules() if any(n.endswith(name) for name in names)]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if None not in ends and getattr(ends[0], "weight", None) is getattr(ends[1], "weight", None):
        pair = [n for n, m in model.named_modules() if m in ends]
        saved += pair if set(pair) & set(saved) else []
    return saved


def _lies_in(name: str, blocks: list[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _list(names: list[str]) -> str:
    return f"[{','.join(names)}]"


def _override(key: str, names: list[str]) -> str:
    """`lora.<key>=[...]` to be typed: quoted for the shell where it names several."""
    text = f"lora.{key}={_list(list(dict.fromkeys(names)))}"
    return f"'{text}'" if len(names) > 1 else text
