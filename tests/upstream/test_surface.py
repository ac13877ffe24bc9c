"""The contract with what other packages do not promise: their private names, and the methods that we override.

An upgrade that takes one away or gives it other parameters turns this test red, and not a run. A new use in our files does too,
until it has a row here: prefer a public name, and where there is none, say here what we count on.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.upstream.scan import ROOT, Use, resolve, sources, uses

FACTORIES = {"ResumableTrainer": "trl.SFTTrainer"}
"""Classes that are put before a class of theirs as a base, and that class."""
OURS = {".parse"}
"""Attributes of our own objects that a function is assigned to."""

# What each name has to be:
#   (a, b, *c)  a function or class with these parameters
#   function    one in C++, which tells no parameters
#   attribute   of an instance or class; set in the source of the class or of one that it inherits from
#   value       of a module
#   source      a class in a file that we read as text, which would take seconds to import
#   taken       by us: nobody else's code has such an attribute yet
SURFACE = {
    # transformers and TRL: the trainer
    "trl.SFTTrainer.train": "(self, resume_from_checkpoint, trial, ignore_keys_for_eval)",
    "trl.SFTTrainer.training_step": "(self, *args, **kwargs)",
    "transformers.Trainer.training_step": "(self, model, inputs, num_items_in_batch)",
    "trl.SFTTrainer.create_optimizer": "(self, model)",
    "trl.SFTTrainer.compute_loss": "(self, model, inputs, return_outputs, num_items_in_batch)",
    "transformers.Trainer.compute_loss": "(self, model, inputs, return_outputs, num_items_in_batch)",
    "trl.SFTTrainer.prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys)",
    "trl.SFTTrainer.evaluation_loop": "(self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)",
    "trl.SFTTrainer.get_eval_dataloader": "(self, eval_dataset)",
    "trl.SFTTrainer.floating_point_ops": "(self, inputs)",
    "trl.SFTTrainer.get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "trl.SFTTrainer.log": "(self, logs, start_time)",
    "trl.SFTTrainer._prepare_inputs": "(self, inputs)",
    "trl.SFTTrainer._evaluate": "(self, trial, ignore_keys_for_eval, skip_scheduler)",
    "trl.SFTTrainer._determine_best_metric": "(self, metrics, trial)",
    "trl.SFTTrainer._clip_grad_norm": "(self, model)",
    "trl.SFTTrainer._get_grad_norm": "(self, model, grad_norm)",
    "trl.SFTTrainer._get_train_sampler": "(self, train_dataset)",
    "trl.SFTTrainer._get_eval_sampler": "(self, eval_dataset)",
    "trl.SFTTrainer._run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "trl.SFTTrainer._maybe_log_save_evaluate": "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, "
    "start_time, learning_rate)",
    "trl.SFTTrainer._save_checkpoint": "(self, model, trial)",
    "trl.SFTTrainer._save_optimizer_and_scheduler": "(self, output_dir)",
    "trl.SFTTrainer._save_scaler": "(self, output_dir)",
    "trl.SFTTrainer._save_rng_state": "(self, output_dir)",
    "trl.SFTTrainer._load_rng_state": "(self, checkpoint)",
    "trl.SFTTrainer._tr_loss": "attribute",
    "trl.SFTTrainer._total_loss_scalar": "attribute",
    "trl.SFTTrainer._globalstep_last_logged": "attribute",
    "transformers.TrainerCallback.on_train_begin": "(self, args, state, control, **kwargs)",
    "transformers.TrainerCallback.on_train_end": "(self, args, state, control, **kwargs)",
    "transformers.TrainerCallback.on_step_begin": "(self, args, state, control, **kwargs)",
    "transformers.TrainerCallback.on_step_end": "(self, args, state, control, **kwargs)",
    "transformers.TrainerCallback.on_prediction_step": "(self, args, state, control, **kwargs)",
    "transformers.TrainerCallback.on_log": "(self, args, state, control, **kwargs)",
    "transformers.ProgressCallback.on_log": "(self, args, state, control, logs, **kwargs)",
    "transformers.TrainingArguments._n_gpu": "attribute",
    "transformers.TrainingArguments._setup_devices": "attribute",
    "transformers/training_args.py:TrainingArguments": "source",
    "transformers/training_args.py:OptimizerNames": "source",
    "transformers/trainer_utils.py:SchedulerType": "source",
    "peft/config.py:PeftConfigMixin": "source",
    "peft/config.py:PeftConfig": "source",
    "peft/tuners/lora/config.py:LoraConfig": "source",
    "trl/trainer/sft_config.py:SFTConfig": "source",
    "trl/trainer/base_config.py:_BaseConfig": "source",
    # transformers and PEFT: the model
    "transformers.PreTrainedModel._set_gradient_checkpointing": "(self, enable, gradient_checkpointing_func, every_n_layers)",
    "transformers.PreTrainedModel._supports_attention_backend": "attribute",
    "transformers.PreTrainedConfig._attn_implementation": "attribute",
    "transformers.PreTrainedConfig._commit_hash": "attribute",
    "transformers.PreTrainedConfig._name_or_path": "attribute",
    "transformers.cache_utils.StaticLayer.update": "(self, key_states, value_states, *args, **kwargs)",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward": "(self, hidden_states)",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm.variance_epsilon": "attribute",
    "peft.tuners.lora.layer.Linear.forward": "(self, x, *args, **kwargs)",
    "bitsandbytes.nn.Linear4bit.forward": "(self, x)",
    # torch
    "torch.nn.Linear.forward": "(self, input)",
    "torch.nn.Module.train": "(self, mode)",
    "torch.nn.Module.zero_grad": "(self, set_to_none)",
    "torch.nn.Module._parameters": "attribute",
    "torch.nn.Module._buffers": "attribute",
    "torch.Tensor._version": "attribute",
    "torch.Tensor._backward_hooks": "attribute",
    "torch.optim.AdamW.found_inf": "attribute",
    "torch.autograd.Function.forward": "(*args, **kwargs)",
    "torch.autograd.Function.backward": "(ctx, *grad_outputs)",
    "torch._foreach_copy_": "function",
    "torch._foreach_mul": "function",
    "torch._scaled_mm": "function",
    "torch.nn.parallel.DistributedDataParallel._ddp_params_and_buffers_to_ignore": "attribute",
    "torch.ops.aten._flash_attention_forward": "(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, "
    "return_debug_mask, scale, window_size_left, window_size_right, seqused_k, alibi_slopes, block_table, num_splits)",
    "torch._dynamo.mark_static": "(t, index)",
    "torch._dynamo.config.specialize_float": "value",
    "torch._dynamo.config.recompile_limit": "value",
    "torch._dynamo.config.optimize_ddp": "value",
    "torch._dynamo.config.force_parameter_static_shapes": "value",
    "torch._dynamo.config.force_nn_module_property_static_shapes": "value",
    "torch._inductor.async_compile.maybe_warm_pool": "()",
    "torch.distributed.distributed_c10d._pickler": "(file, protocol, fix_imports, buffer_callback)",
    "torch.distributed.distributed_c10d._unpickler": "(file, fix_imports, encoding, errors, buffers)",
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb": "(q, k, cos, sin, unsqueeze_dim)",
    # accelerate, datasets, huggingface_hub
    "accelerate.state.PartialState._shared_state": "attribute",
    "datasets.Dataset._fingerprint": "attribute",
    "datasets.Dataset._unsloth_truncated_to": "taken",
    "huggingface_hub.CommitOperationAdd._should_ignore": "attribute",
    "huggingface_hub.utils._http": "value",
    "huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY": "value",
    # Hydra and its plugins
    "hydra._internal.utils.get_args_parser": "()",
    "hydra._internal.utils.create_config_search_path": "(search_path_dir)",
    "hydra._internal.config_repository.IConfigRepository": "()",
    "hydra._internal.hydra.Hydra": "(task_name, config_loader)",
    "hydra._internal.hydra.Hydra.create_main_hydra2": "(task_name, config_search_path)",
    "hydra._internal.config_loader_impl.ConfigLoaderImpl._parse_overrides_and_create_caching_repo": "(self, config_name, "
    "overrides)",
    "argparse.ArgumentParser.error": "(self, message)",
    "hydra._internal.config_loader_impl.get_overrides_dirname": "(overrides, exclude_keys, item_sep, kv_sep)",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper": "(max_batch_size, params)",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper.setup": "(self, hydra_context, task_function, config)",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper.sweep": "(self, arguments)",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper.split_arguments": "(overrides, max_batch_size)",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper.validate_batch_is_legal": "(self, batch)",
    "hydra.plugins.search_path_plugin.SearchPathPlugin.manipulate_search_path": "(self, search_path)",
    "hydra.plugins.launcher.Launcher.setup": "(self, hydra_context, task_function, config)",
    "hydra.plugins.launcher.Launcher.launch": "(self, job_overrides, initial_job_idx)",
    "hydra.core.config_store.ConfigStore.__deepcopy__": "taken",
    "hydra.core.override_parser.types.Override._value": "attribute",
    "hydra.core.override_parser.types.Override.config_loader": "attribute",
    "hydra_plugins.hydra_ray_launcher._launcher_util.start_ray": "(init_cfg)",
    "hydra_plugins.hydra_ray_launcher._launcher_util.launch_job_on_ray": "(hydra_context, ray_cfg, sweep_config, "
    "task_function, singleton_state)",
    # W&B, llama.cpp
    "wandb.sdk.wandb_settings.Settings.settings_system": "attribute",
    "wandb.sdk.wandb_settings.Settings.update_from_system_settings": "(self)",
    "wandb.sdk.wandb_settings.Settings.update_from_env_vars": "(self, environ)",
    "wandb_workspaces.workspaces.Workspace._to_model": "(self)",
    "gguf/constants.py:LlamaFileType": "source",
}  # fmt: skip


@cache
def found_uses() -> list[Use]:
    return uses(sources(), FACTORIES)


def rows_for(use: Use) -> list[str]:
    """Rows of the table that speak of a use; of an attribute, those of any class."""
    if use.name.startswith("/"):
        return [row for row in SURFACE if f"/{row.partition(':')[0]}".endswith(use.name)]
    return [row for row in SURFACE if row == use.name or (use.name[0] == "." and row.endswith(use.name))]


def users_of(row: str) -> str:
    """The files that use a name, as a sentence names them."""
    last = re.split(r"[.:]", row)[-1]
    files = {use.file for use in found_uses() if row in rows_for(use)}
    files = files or {
        f.relative_to(ROOT).as_posix() for f in sources() if re.search(rf"\b{last}\b", f.read_text(encoding="utf-8"))
    }
    return ", ".join(sorted(files))


def fault_of(name: str, expected: str) -> str:
    """What is wrong with a name of the table in the installed packages; empty if nothing is."""
    if expected == "source":
        path, _, cls = name.partition(":")
        package, _, file = path.partition("/")
        source = Path(importlib.util.find_spec(package).submodule_search_locations[0], file)
        if not source.is_file():
            return "there is no such file"
        held = [node.name for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        return "" if cls in held else "the file has no such class"
    owner, _, last = name.rpartition(".")
    try:
        holder = resolve(owner)
    except (ImportError, AttributeError):
        return f"there is no {owner}"
    there = hasattr(holder, last) or (expected == "attribute" and _sets(holder, last))
    if expected == "taken":
        ours = getattr(getattr(holder, last, None), "__module__", None) in _own_modules()
        return "somebody else has it now" if there and not ours else ""
    if not there:
        return "it is not there"
    if expected in ("attribute", "value"):
        return ""
    found = getattr(holder, last)
    if expected == "function":
        return "" if callable(found) else "it is no function"
    parameters = _parameters(found)
    return "" if parameters == expected else f"its parameters are {parameters}, and were {expected}"


def _own_modules() -> set[str]:
    return {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sources()}


def _sets(cls: type, name: str) -> bool:
    """Whether instances of a class have an attribute, by their fields and the source."""
    texts = [
        inspect.getsource(base)
        for base in cls.__mro__
        if base.__module__.partition(".")[0] not in ("builtins", "typing", "abc")
    ]
    fields = [{**getattr(base, "__annotations__", {})} for base in cls.__mro__]
    return any(name in known for known in fields) or any(re.search(rf"\bself\.{name}\b|\"{name}\"", text) for text in texts)


def _parameters(function: Any) -> str:
    """Their names as they are written in a `def`."""
    if hasattr(function, "default") and hasattr(function.default, "_schema"):  # an operator of torch
        return f"({', '.join(argument.name for argument in function.default._schema.arguments)})"
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return f"({', '.join(marks.get(p.kind, '') + p.name for p in inspect.signature(function).parameters.values())})"


@pytest.mark.parametrize("name", SURFACE)
def test_the_installed_packages_have_every_private_name_as_we_use_it(name):
    package = re.split(r"[./]", name)[0]
    if package == "hydra_plugins":
        package = ".".join(name.split(".")[:2])
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports, which another test would see as well
        fault = fault_of(name, SURFACE[name])
    assert not fault, f"{name}, which {users_of(name)} uses: {fault}. See what replaces it before you change this row."


def test_every_private_name_that_our_files_use_has_a_row():
    missing = [
        f"{use.file}:{use.line} uses {use.name}, which its package does not promise. Use a public name, or give it a row."
        for use in found_uses()
        if not rows_for(use) and use.name not in OURS
    ]
    assert not missing, "\n".join(missing)


def test_every_row_is_still_used():
    unused = [row for row in SURFACE if not users_of(row)]
    assert not unused, f"nothing uses {', '.join(unused)} any more: take these rows out"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch._foreach_add([], [])", "torch._foreach_add"),
        ("from peft.tuners import _buffer_dict", "peft.tuners._buffer_dict"),
        ("from hydra._internal.hydra import Hydra", "hydra._internal.hydra.Hydra"),
        ("def f(config):\n    return config._unheard_of", "._unheard_of"),
        ("def f(config):\n    return getattr(config, '_unheard_of', None)", "._unheard_of"),
        ("def f(args):\n    args.__dict__['_unheard_of'] = 1", "._unheard_of"),
        ("from trl import SFTTrainer\nclass T(SFTTrainer):\n    def get_batch_samples(self):\n        pass",
         "trl.SFTTrainer.get_batch_samples"),
        ("from trl import SFTTrainer\nclass T(SFTTrainer):\n    def f(self):\n        return self._issue_warnings",
         "._issue_warnings"),
        ("import transformers\ntransformers.set_seed = print", "transformers.set_seed"),
        ("def f(layer):\n    def new():\n        pass\n    layer.reset = new", ".reset"),
        ("class Mine:\n    def __init__(self):\n        self._own = 1\n    def f(self, b):\n        return b._own", None),
        ("import os\nos._exit(1)", None),
        ("from sft import lifecycle\nlifecycle._export", None),
    ],
)  # fmt: skip
def test_a_new_use_is_found_by_its_kind(tmp_path, code, found):
    file = tmp_path / "new.py"
    file.write_text(code, encoding="utf-8")
    assert [use.name for use in uses([file], FACTORIES, tmp_path)] == ([found] if found else [])


def test_a_class_whose_base_nobody_names_is_refused(tmp_path):
    file = tmp_path / "new.py"
    file.write_text("def make(base):\n    class Trainer(base):\n        pass", encoding="utf-8")
    with pytest.raises(LookupError, match=r"new\.py:2: .*class Trainer .*FACTORIES"):
        uses([file], FACTORIES, tmp_path)


def test_an_upgrade_is_told_with_the_name_and_the_file_that_uses_it(monkeypatch):
    from trl import SFTTrainer

    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", lambda self, model, trial, metrics=None: None)
    assert fault_of("trl.SFTTrainer._save_checkpoint", SURFACE["trl.SFTTrainer._save_checkpoint"]) == (
        "its parameters are (self, model, trial, metrics), and were (self, model, trial)"
    )
    assert re.search(r"sft/training/trainer\.py", users_of("trl.SFTTrainer._save_checkpoint"))
    assert fault_of("trl.SFTTrainer._gone", "(self)") == "it is not there"
    assert fault_of("hydra._internal.gone.call", "()") == "there is no hydra._internal.gone"
