"""What `model.backend=auto` comes to on a GPU, by the GPU and the model."""

import json

import pytest
import torch

from sft.model import loading
from sft.model.hub import read_config
from sft.plan.machine import Machine, look
from sft.plan.plan import plan_model
from tests.conftest import SMALL, make_settings

LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [((), torch.bfloat16), (("lora=none",), torch.float32), (("lora=none", "model.dtype=bfloat16"), torch.bfloat16)],
)
def test_weights_that_are_all_trained_are_loaded_in_float32(overrides, dtype):
    """As on a GPU that computes in bfloat16."""
    settings = make_settings(*SMALL, *overrides)
    loaded, _ = loading.load_model(settings, plan_model(settings, Machine("as a GPU", True, 80.0, 80.0, True)))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("overrides", "backend"),
    [
        (["preflight.gpu=h100"], "transformers"),
        (["preflight.gpu=h100", "model.load_in_4bit=true"], "transformers"),
        (["preflight.gpu=l4", "model.load_in_4bit=true"], "transformers"),
        (["preflight.gpu=l4"], "unsloth"),  # 16 GB of weights in 22
        (["preflight.gpu=h100", "model.load_in_4bit=true", "trainer.max_memory_gib=16"], "transformers"),
        (["preflight.gpu=h100", "trainer.max_memory_gib=20"], "unsloth"),
        (["preflight.gpu=t4", "model.load_in_4bit=true"], "unsloth"),  # no attention for rows end to end
        (["preflight.gpu=h100", "trainer.padding_free=false"], "unsloth"),
        (["preflight.gpu=h100", "trainer.gradient_checkpointing=true"], "unsloth"),
        (["preflight.gpu=h100", "model.backend=unsloth"], "unsloth"),
        (["preflight.gpu=t4", "model.backend=transformers"], "transformers"),
        ([], "transformers"),  # no GPU at all
    ],
)
def test_rows_end_to_end_where_they_can_be_had_and_the_weights_leave_room(tmp_path, overrides, backend):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    settings = make_settings(f"model.name={tmp_path}", *overrides)
    assert plan_model(settings, look(settings), lambda: read_config(settings.model)).backend == backend


@pytest.mark.parametrize("config", [{**LLAMA_8B, "model_type": "gemma3"}, {"model_type": "mixtral"}, None])
def test_models_that_were_not_tried_stay_with_unsloth(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = make_settings(f"model.name={tmp_path}", "preflight.gpu=h100")
    assert plan_model(settings, look(settings), lambda: read_config(settings.model)).backend == "unsloth"
