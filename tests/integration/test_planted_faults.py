"""Faults that a model's own kind makes possible, planted in tiny random twins: each is caught by the check that is there for
it.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.errors import Refusal
from sft.model import padding_free
from sft.storage.jsonio import read_json
from sft.training import acceleration
from tests.faults.fault_campaign import write_rows
from tests.integration.test_families import make_twin, train, twin, without_charts  # noqa: F401

pytestmark = pytest.mark.usefixtures("forked_children")


# ------------------------------------------------------------------------------------------ rows that see each other


@pytest.fixture
def without_obstacles(monkeypatch):
    """What is known of a model without running it keeps nothing from padding-free rows."""
    monkeypatch.setattr(acceleration, "_obstacle", lambda base: "")


def padding_free_twin(folder):
    """The twin in `folder`, as a run loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    padding_free.install(model)
    return model


def rows():
    made = torch.Generator().manual_seed(1)
    ids = [torch.randint(10, 4096, (count,), generator=made).tolist() for count in (40, 60, 90)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"], ids=["hybrid", "convolution"])
def test_a_state_that_leaks_from_row_to_row_pads_the_rows_and_is_refused_where_padding_free_was_asked_for(
    family, twin, tmp_path, without_obstacles  # noqa: F811
):  # fmt: skip
    job = (f"model.name={twin(family)}", write_rows(tmp_path), "trainer.max_steps=1")
    speed = read_json(train(tmp_path / "run", *job) / "run.json")["speed"]
    assert not speed["padding_free"] and speed["why_not"].startswith("a row would ")
    with pytest.raises(Refusal, match="a row would "):
        train(tmp_path / "asked", *job, "trainer.padding_free=true")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"], ids=["hybrid", "convolution"])
def test_a_leak_is_found_in_16_bits_too_whose_rounding_hides_it_from_a_row_alone(family, dtype, twin):  # noqa: F811
    model = padding_free_twin(twin(family))
    model._supports_attention_backend = True
    assert acceleration._difference(model, rows(), 0, dtype).startswith("a row would ")


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_a_thousandth_of_the_token_before_is_a_leak(share, twin):  # noqa: F811
    model = padding_free_twin(twin("llama"))
    assert acceleration._difference(model, rows(), 0, torch.bfloat16) == ""

    def mix(module, inputs, output):
        return output + share * torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)

    model.model.layers[0].mlp.register_forward_hook(mix)
    assert "a row would see another one" in acceleration._difference(model, rows(), 0, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "granite", "phi3", "gemma3_text", "gemma4_text", "qwen3_moe"])
def test_rows_of_a_family_that_is_padding_free_see_none_of_each_other(family, dtype, twin):  # noqa: F811
    assert acceleration._difference(padding_free_twin(twin(family)), rows(), 0, dtype) == ""
