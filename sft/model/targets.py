"""Which layers of a model get an adapter: the names that `lora` gives, matched as PEFT matches them."""

import copy
import difflib
import re
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

from sft.config.keys import typed
from sft.config.lora_rules import CHOOSE_LAYERS, LORAPLUS, is_pattern
from sft.config.patterns import compile_pattern
from sft.config.schema import LoraSettings
from sft.errors import Problem, first_line

ALL_LINEAR = "all-linear"


def options_of(model: Any, lora: LoraSettings) -> dict[str, Any]:
    """The options of LoraConfig that `lora` comes to for this model."""
    tied = bool({"embed_tokens", "lm_head"} & set(lora.modules_to_save)) and model.config.get_text_config().tie_word_embeddings
    names = targets_of(model, lora)
    return {
        "r": lora.r,
        "lora_alpha": int(lora.lora_alpha) if float(lora.lora_alpha).is_integer() else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": ALL_LINEAR if lora.target_modules == [ALL_LINEAR] and not _by_layer(lora) else names,
        "bias": lora.bias.value,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "modules_to_save": list(lora.modules_to_save) or None,
        # Trained copies of tied layers stay one, as in the model itself; two would differ, and a merge could keep only one.
        "ensure_weight_tying": tied,
        **{name: value for name, value in lora.extra.items() if value is not None and name != LORAPLUS},
    }


def targets_of(model: Any, lora: LoraSettings) -> list[str]:
    """`lora.target_modules` as names alone: a regular expression stands for the linear layers and embeddings that it matches,
    because PEFT would end at a block among them."""
    if lora.target_modules == [ALL_LINEAR]:
        return _linear(model, output=False)
    listed = [list(_named(model, target)) if is_pattern(target) else [target] for target in lora.target_modules]
    return list(dict.fromkeys(name for names in listed for name in names))


def reached(model: Any, lora: LoraSettings) -> dict[str, Any]:
    """The layers that get an adapter, by name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = SimpleNamespace(
        target_modules=targets_of(model, lora),
        modules_to_save=list(lora.modules_to_save) or None,
        target_parameters=None,
        **{name: lora.extra.get(name) for name in CHOOSE_LAYERS},
    )
    head = model.get_output_embeddings() if lora.target_modules == [ALL_LINEAR] else None
    whole = _whole(model, lora.modules_to_save)
    return {
        name: module
        for name, module in model.named_modules()
        if module is not head and check_target_module_exists(config, name) and not _lies_in(name, whole)
    }


def rank_of(name: str, lora: LoraSettings) -> int:
    """The rank of the adapter on the layer `name`."""
    return next((rank for key, rank in (lora.extra.get("rank_pattern") or {}).items() if _matches(key, name)), lora.r)


def coverage(model: Any, lora: LoraSettings) -> tuple[str, list[Problem], list[str]]:
    """(which kinds of layers get an adapter and which not, problems, warnings): a kind is a layer's last name."""
    layers, adapted = _linear_layers(model), reached(model, lora)
    every, with_one = (Counter(n.rpartition(".")[2] for n in names if n in layers) for names in (layers, adapted))
    parameters = parameters_of(model, lora.extra.get("target_parameters") or [])
    rest = [kind for kind in every if not with_one[kind]]
    part = [f"{kind} ({with_one[kind]} of {n})" for kind, n in every.items() if 0 < with_one[kind] < n]
    text = f"an adapter on {len(with_one)} of {len(every)} kinds of linear layers, {with_one.total()} of {every.total()} layers"
    text += (f"; not: {', '.join(rest)}" if rest else "") + (f"; in part: {', '.join(part)}" if part else "")
    others = [name for name in adapted if name not in layers] + parameters
    text += f"; and on {', '.join(dict.fromkeys(n.rpartition('.')[2] for n in others))}" if others else ""
    blocks, left_out = _blocks_reached(model, lora, [*adapted, *parameters])
    text += blocks
    problems = []
    if not adapted and not parameters:
        chosen = [f"lora.extra.{name}" for name in CHOOSE_LAYERS if lora.extra.get(name) is not None]
        what = " ".join([f"lora.target_modules={_list(lora.target_modules)}", *(f"{key}=..." for key in chosen)])
        fix = f"leave {' and '.join(chosen)} out" if chosen else "lora.target_modules=[all-linear]"
        problems.append(Problem(what, "No layer of the model gets an adapter.", fix))
    return text, problems, left_out


def _blocks_reached(model: Any, lora: LoraSettings, names: list[str]) -> tuple[str, list[str]]:
    """(how many token mixers and experts have an adapter in them, warnings of kinds without any); `names` have one."""
    text, left_out = "", []
    targets = targets_of(model, lora) if lora.target_modules == [ALL_LINEAR] else lora.target_modules
    kinds = {kind: [any(_lies_in(n, [mixer]) for n in names) for mixer in at] for kind, at in _token_mixers(model).items()}
    every = sum(map(len, kinds.values()))
    if len(kinds) > 1 or not all(map(all, kinds.values())):
        text += f"; {sum(map(sum, kinds.values()))} of {every} token mixers"
    for kind, found in kinds.items():
        if not any(found):
            inside = _linear(model, kind)
            fix = typed("lora.target_modules", [*targets, *inside])
            layers = f"Its linear layers are {', '.join(inside)}: {fix}"
            left_out.append(f"No {kind} gets an adapter, {len(found)} of the {every} token mixers. {layers}")
    experts = _experts(model)
    if experts:
        some = sum(count for name, count in experts.items() if any(_lies_in(n, [name]) for n in names))
        text += f"; {some} of {sum(experts.values())} experts"
        if not some and (where := _expert_parameters(model)):
            fix = typed("lora.extra.target_parameters", where)
            left_out.append(f"None of the {sum(experts.values())} experts gets an adapter. {fix} gives them one.")
    return text, left_out


def check_modules(model: Any, lora: LoraSettings) -> tuple[list[Problem], list[str]]:
    """(problems, warnings) of the modules that `lora` names, by the names and kinds of a model's modules, which may be on the
    meta device. Names are matched as PEFT matches them.
    """
    problems, warnings = [*_check_targets(model, lora.target_modules), *_check_saved(model, lora.modules_to_save)], []
    if not problems and lora.extra:
        problems += _check_extra(model, lora)
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
    if idle := [t for t in missing if is_pattern(t)]:
        why = f"It has to match whole names of layers, such as {next(iter(_linear_layers(model)), '')}, and matches none: "
        whole = [f".*({t})" for t in idle if any(re.search(f"({t})$", name) for name in _linear_layers(model))]
        fix = typed("lora.target_modules", whole) if whole else _override("target_modules", [ALL_LINEAR])
        return [Problem(typed("lora.target_modules", targets), why + ", ".join(idle), fix)]
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
    blocks, head = list(_named(model, inside)) if inside else [], model.get_output_embeddings()
    found = _linear_layers(model).items()
    names = [n for n, m in found if (not inside or _lies_in(n, blocks)) and (output or m is not head)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _named(model: Any, target: str) -> dict[str, Any]:
    """The modules that PEFT takes for an entry of `target_modules`; for a regular expression, those an adapter can sit on."""
    import torch

    if is_pattern(target):
        fitting = {n: m for n, m in model.named_modules() if _is_linear(m) or isinstance(m, torch.nn.Embedding)}
        return {name: module for name, module in fitting.items() if compile_pattern(target).fullmatch(name)}
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


# ---------------------------------------------------------------------------------------------- PEFT's other options


def _check_extra(model: Any, lora: LoraSettings) -> list[Problem]:
    """What of `lora.extra` names nothing in the model, or is not taken by PEFT."""
    extra, problems = lora.extra, []
    adapted = reached(model, lora)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in adapted))
    for key in ("rank_pattern", "alpha_pattern"):
        for name in extra.get(key) or {}:
            if not any(_matches(name, layer) for layer in adapted):
                close = difflib.get_close_matches(name, kinds, 1, 0.6)
                why = f"No layer with an adapter is named {name}. Those that have one: {', '.join(kinds)}."
                better = {(close[0] if n == name and close else n): v for n, v in extra[key].items() if n != name or close}
                fix = typed(f"lora.extra.{key}", better) if better else f"leave lora.extra.{key} out"
                problems.append(Problem(typed(f"lora.extra.{key}", extra[key]), why, fix))
    problems += _check_layer_numbers(model, lora) + _check_excluded(model, lora)
    wanted = extra.get("target_parameters") or []
    missing = [name for name in wanted if not parameters_of(model, [name])]
    if missing:
        known = _expert_parameters(model)
        why = f"The model has no parameter named {', '.join(missing)}."
        why += (
            f" Those outside of linear layers: {', '.join(known)}."
            if known
            else " Its weights all lie in layers that targets name."
        )
        fix = typed("lora.extra.target_parameters", known) if known else "leave lora.extra.target_parameters out"
        problems.append(Problem(typed("lora.extra.target_parameters", wanted), why, fix))
    problems += _check_token_numbers(model, extra)
    return problems or _try(model, lora)


def _check_layer_numbers(model: Any, lora: LoraSettings) -> list[Problem]:
    wanted = lora.extra.get("layers_to_transform")
    if wanted is None:
        return []
    numbers = wanted if isinstance(wanted, list) else [wanted]
    found = [re.match(r".*?\.[^.]*\.(\d+)\.", name) for name, _ in model.named_modules()]
    most = max((int(match[1]) for match in found if match), default=-1)
    if all(0 <= n <= most for n in numbers):
        return []
    fitting = [n for n in numbers if 0 <= n <= most]
    fix = typed("lora.extra.layers_to_transform", fitting) if fitting else "leave lora.extra.layers_to_transform out"
    return [Problem(typed("lora.extra.layers_to_transform", wanted), f"The model's layers are 0 to {most}.", fix)]


def _check_excluded(model: Any, lora: LoraSettings) -> list[Problem]:
    wanted = lora.extra.get("exclude_modules")
    if not wanted:
        return []
    plain = LoraSettings(target_modules=lora.target_modules, modules_to_save=lora.modules_to_save)
    names = list(reached(model, plain))
    listed = [wanted] if isinstance(wanted, str) else wanted
    idle = [
        e
        for e in listed
        if not any(re.fullmatch(e, n) if isinstance(wanted, str) else f".{n}".endswith(f".{e}") for n in names)
    ]
    if not idle:
        return []
    why = f"No layer that would get an adapter is named {', '.join(idle)}, so that it would exclude nothing."
    rest = [e for e in listed if e not in idle]
    fix = typed("lora.extra.exclude_modules", rest) if rest else "leave lora.extra.exclude_modules out"
    return [Problem(typed("lora.extra.exclude_modules", wanted), why, fix)]


def _check_token_numbers(model: Any, extra: dict[str, Any]) -> list[Problem]:
    wanted = extra.get("trainable_token_indices")
    if not wanted:
        return []
    rows = model.get_input_embeddings().weight.shape[0]
    numbers = wanted if isinstance(wanted, list) else [n for listed in wanted.values() for n in listed]
    beyond = [n for n in numbers if not 0 <= n < rows]
    if not beyond:
        return []
    why = f"The model's embeddings have {rows} rows, and none for {', '.join(map(str, beyond))}."
    fix = typed("lora.extra.trainable_token_indices", [n for n in numbers if n not in beyond] or [rows - 1])
    return [Problem(typed("lora.extra.trainable_token_indices", wanted), why, fix)]


def _try(model: Any, lora: LoraSettings) -> list[Problem]:
    """What PEFT says against `lora.extra`, on a copy of the model that has no weights; nothing where this one has some."""
    from peft import LoraConfig, get_peft_model

    if not next(model.parameters()).is_meta or not reached(model, lora):
        return []
    options = options_of(model, lora) | {"init_lora_weights": lora.extra.get("init_lora_weights") is not False}
    try:
        with warnings.catch_warnings(action="ignore"):
            get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **options), low_cpu_mem_usage=True)
    except Exception as error:  # whatever its checks raise
        what = " ".join(typed(f"lora.extra.{name}", value) for name, value in lora.extra.items())
        return [Problem(what, f"PEFT does not take it: {first_line(error)}", "leave it out, or change what it names")]
    return []


def _matches(key: str, name: str) -> bool:
    """Whether a key of `rank_pattern` means the layer `name`, as PEFT reads it (`get_pattern_key`)."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


# ------------------------------------------------------------------------------------------------ the model's parts


def _linear_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D)) or "linear" in type(module).__name__.lower()


FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|experts|^fc", re.IGNORECASE)
"""What models call the blocks of a layer that do not mix tokens."""


def _token_mixers(model: Any) -> dict[str, list[str]]:
    """Blocks of the decoder layers that mix tokens (attention, state spaces, convolutions), by the name of their kind."""
    from sft.model.structure import decoder_layers

    layers = {id(layer) for layer in decoder_layers(model)}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for child, block in module.named_children() if id(module) in layers else ():
            if not FEED_FORWARD.search(child) and any(_is_linear(m) for m in block.modules() if m is not block):
                found.setdefault(child, []).append(f"{name}.{child}")
    return found


def _experts(model: Any) -> dict[str, int]:
    """Experts of each block of them: those that share one parameter of three dimensions, or stand in a list."""
    import torch

    found = {}
    for name, module in model.named_modules():
        wide = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        if name.endswith("experts") and (wide or isinstance(module, torch.nn.ModuleList)):
            found[name] = wide[0].shape[0] if wide else len(module)
    return found


def count_expert_blocks(model: Any) -> int:
    """How many layers have experts."""
    return len(_experts(model))


def _expert_parameters(model: Any) -> list[str]:
    """Parameters of three dimensions, which no target names, by the end of their names that is the same in all layers."""
    names = [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names))


def parameters_of(model: Any, wanted: list[str]) -> list[str]:
    """Names of the parameters that PEFT takes for entries of `target_parameters`."""
    return [n for n, _ in model.named_parameters() if any(n == w or n.endswith(f".{w}") for w in wanted)]


def _by_layer(lora: LoraSettings) -> bool:
    return lora.extra.get("layers_to_transform") is not None
