"""Faults that a model's own kind makes possible, planted in tiny random twins: each is caught by the check that is there for
it.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.errors import Refusal
from sft.export import exporter, merge
from sft.model import adapters, padding_free, structure
from sft.model import loss as model_loss
from sft.runs.saved import settings_of
from sft.storage.jsonio import read_json
from sft.training import acceleration
from tests.faults.fault_campaign import write_rows
from tests.integration.test_families import make_twin, train, twin, without_charts  # noqa: F401

pytestmark = pytest.mark.usefixtures("forked_children")


# ------------------------------------------------------------------------------------------ rows that see each other


@pytest.fixture
def without_obstacles(monkeypatch):
    """What is known of a model without running it keeps nothing from padding-free rows."""
    monkeypatch.setattr("sft.model.padding_free.obstacle", lambda base: "")


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


# ------------------------------------------------------------------------------------------------- a lost soft cap


def scaled_twin(folder, target, cap, factor):
    """A copy of the twin in `folder` with a cap of its logits, which are `factor` times as large."""
    shutil.copytree(folder, target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_output_embeddings().weight.data *= factor  # its own embeddings, which a norm follows
    model.config.final_logit_softcapping = cap
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("trained", [True, False], ids=["output layer trained", "output layer frozen"])
def test_the_loss_and_log_probs_of_capped_logits_and_their_gradients_are_those_of_whole_logits(monkeypatch, cap, trained):
    monkeypatch.setattr(model_loss, "PIECE", 30)
    torch.manual_seed(0)
    hidden, weight, targets, given = torch.randn(7, 5), torch.randn(11, 5) * 3, torch.randint(0, 11, (7,)), torch.randn(7)
    found = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logits = h @ w.t()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        logs = torch.log_softmax(logits / 0.7, -1).gather(1, targets[:, None])[:, 0]
        if ours:
            loss = model_loss.linear_cross_entropy(h, w, targets, cap)
            logs = model_loss.linear_log_probs(h, w, targets, 0.7, cap)
        (loss / 3 + (logs * given).sum()).backward()
        found.append((loss.detach(), logs.detach(), h.grad, w.grad if trained else torch.zeros(1)))
    for ours, whole in zip(*found, strict=True):
        assert torch.allclose(ours, whole, atol=1e-5)


def test_a_model_that_caps_its_logits_is_padding_free_with_the_loss_of_padded_rows(twin, tmp_path):  # noqa: F811
    place = scaled_twin(twin("gemma3_text"), tmp_path / "capped", 2.0, 30)
    job = (f"model.name={place}", write_rows(tmp_path), "trainer.max_steps=2")
    free, padded = (read_json(train(tmp_path / name, *job, *more) / "run.json")
                    for name, more in (("free", ()), ("padded", ("trainer.padding_free=false",))))  # fmt: skip
    assert free["speed"]["padding_free"] and not padded["speed"]["padding_free"]
    for key in ("eval_loss_start", "eval_loss"):
        assert free["metrics"][key] == pytest.approx(padded["metrics"][key], abs=2e-5)


def test_a_cap_that_the_padding_free_loss_loses_pads_the_rows(twin, tmp_path, monkeypatch):  # noqa: F811
    lost = model_loss.linear_cross_entropy
    monkeypatch.setattr(
        padding_free, "linear_cross_entropy", lambda hidden, weight, targets, cap: lost(hidden, weight, targets)
    )
    model = padding_free_twin(scaled_twin(twin("gemma3_text"), tmp_path / "capped", 2.0, 30))
    assert "the loss of the first rows" in acceleration._difference(model, rows(), 0, torch.float32)


@pytest.mark.parametrize(
    ("cap", "factor", "failed"), [(2.0, 30, ["config", "loss"]), (30.0, 1, ["config"])], ids=["it matters", "it hardly does"]
)
def test_a_soft_cap_that_an_export_loses_fails_its_proof(twin, tmp_path, monkeypatch, cap, factor, failed):  # noqa: F811
    place = scaled_twin(twin("gemma3_text"), tmp_path / "capped", cap, factor)
    job = (f"model.name={place}", write_rows(tmp_path), "trainer.max_steps=2", "export=merged_16bit")
    folder = train(tmp_path / "run", *job)
    assert read_json(folder / "export" / "verify.json")["artifacts"]["merged_16bit"]["failed"] == []
    usual = merge.save

    def save(*args):
        usual(*args)
        config = args[3] / "config.json"
        config.write_text(json.dumps({**read_json(config), "final_logit_softcapping": None}), encoding="utf-8")

    monkeypatch.setattr(merge, "save", save)
    facts = exporter.export_run(folder, settings_of(folder)[0])["artifacts"]["merged_16bit"]
    assert facts["status"] == "failed" and [name for name in facts["failed"] if name != "answers"] == failed
    (check,) = [check for check in facts["checks"] if check["name"] == "config"]
    assert (check["expected"], check["found"]) == (f"final_logit_softcapping={cap}", "final_logit_softcapping=null")


# ------------------------------------------------------------------------------------------- what is never reached


def test_layers_whose_adapter_gets_no_gradient_are_counted_and_named_once(twin, tmp_path, monkeypatch, caplog):  # noqa: F811
    usual = adapters.attach

    def attach(model, *args):
        found = usual(model, *args)
        skipped = structure.decoder_layers(model)[1]
        skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states
        return found

    monkeypatch.setattr(adapters, "attach", attach)
    job = (f"model.name={twin('llama')}", write_rows(tmp_path), "trainer.max_steps=3", "trainer.logging_steps=1")
    train(tmp_path / "run", *job)
    (line,) = [line for line in caplog.messages if "no gradient" in line]
    assert "Step 1: 14 trained weights of 7 layers have had no gradient" in line
    assert "model.layers.1.self_attn.q_proj, " in line and "and 4 more" in line and "layers.0" not in line


def test_all_that_is_trained_of_a_family_gets_a_gradient_and_nothing_is_said(twin, tmp_path, caplog):  # noqa: F811
    job = (f"model.name={twin('qwen3_5_text')}", write_rows(tmp_path), "trainer.max_steps=2")
    train(tmp_path / "run", *job)
    assert not [line for line in caplog.messages if "no gradient" in line or "experts" in line]


@pytest.mark.parametrize("idle", [0, 1])
def test_experts_that_no_token_was_sent_to_are_counted(twin, tmp_path, caplog, idle):  # noqa: F811
    """The router of one expert is 0, and those of two others are opposite: one of these always wins."""
    shutil.copytree(twin("qwen3_moe"), place := tmp_path / "twin")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    for layer in model.model.layers if idle else ():
        layer.mlp.gate.weight.data[0], layer.mlp.gate.weight.data[2] = 0, -layer.mlp.gate.weight.data[1]
    model.config.num_experts_per_tok = 1 if idle else 4
    model.save_pretrained(place)
    names = "[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    job = (f"model.name={place}", write_rows(tmp_path), f"lora.extra.target_parameters={names}", "lora.r=4")
    train(tmp_path / "run", *job, "trainer.max_steps=4")
    said = [line for line in caplog.messages if "sent no token" in line]
    assert len(said) == idle and all("2 of 8 experts were sent no token in training" in line for line in said)


# ---------------------------------------------------------------------------------------------- a wrong chat template


def of_another_kind(template: str) -> str:
    return "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"


def of_one_turn(template: str) -> str:
    """Another only where a conversation goes on, or begins with a word from the system."""
    return template + "{% if messages | length > 1 %}\n{% endif %}"


@pytest.mark.parametrize("fault", [of_another_kind, of_one_turn])
def test_an_export_whose_chat_template_is_another_fails_its_proof(fault, twin, tmp_path, monkeypatch):  # noqa: F811
    job = (f"model.name={twin('qwen3')}", write_rows(tmp_path), "trainer.max_steps=1")
    folder, usual = train(tmp_path / "run", *job), merge.save

    def save(*args):
        usual(*args)
        file = args[3] / "chat_template.jinja"
        file.write_text(fault(file.read_text(encoding="utf-8")), encoding="utf-8")

    settings = settings_of(folder)[0]
    settings.export.formats = ["merged_16bit"]
    assert exporter.export_run(folder, settings)["artifacts"]["merged_16bit"]["failed"] == []
    monkeypatch.setattr(merge, "save", save)
    facts = exporter.export_run(folder, settings)["artifacts"]["merged_16bit"]
    assert facts["status"] == "failed" and facts["failed"] == ["chat_template"]
