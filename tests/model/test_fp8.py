"""Frozen layers in FP8, multiplied by torch's kernels for the CPU: the numbers, runs, and their exports."""

import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sft.distributed.strategy import settle_accelerator
from sft.launch.ranks import launch
from sft.lifecycle import run
from sft.model import fp8, loading, warm_cache
from sft.model.builtin import TINY_RANDOM, local_model
from sft.model.fused_layers import fused_inference
from sft.model.padding_free import install
from sft.plan.plan import plan_saved
from sft.runs.record import Context
from sft.storage.jsonio import read_json, read_lines
from sft.training import acceleration, checkpoint
from tests.conftest import SMALL, make_settings
from tests.faults.fault_campaign import compare

BF16 = torch.bfloat16
JOB = (*SMALL, "tracking=none", "trainer=debug", "model.dtype=bfloat16", "model.load_in_fp8=true", "trainer.max_steps=4",
       "trainer.learning_rate=1e-2", "trainer.warmup_steps=0", "samples.num_held_out=1")  # fmt: skip


def rounded_once(rows):
    """`rows` in float32, each number the nearest of e4m3 with a scale a row."""
    scales = (rows.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12 / 448)
    return (rows.float() / scales).to(torch.float8_e4m3fn).float() * scales


def llama(seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, **sizes}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
    return LlamaForCausalLM(config).to(BF16).eval()


# ------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_product_and_its_gradient_are_those_of_the_same_rounding_in_float32(twice, zeros):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64, dtype=BF16), torch.randn(37, 64, dtype=BF16, requires_grad=True)
    if zeros:
        weight[3], x.data[5] = 0, 0
    rounded, scales = fp8.round_rows(weight)
    out = fp8.Product.apply(x, rounded, scales, rounded.T.contiguous() if twice else None)
    grad = torch.randn_like(out)
    out.backward(grad)
    # The gradient's product sums over the weight's rows, so that their scales go to the other side before it is rounded.
    wanted = rounded_once(x.detach()) @ rounded_once(weight).T
    wanted_grad = rounded_once(grad.float() * scales.T) @ rounded.float()
    for found, other in ((out, wanted), (x.grad, wanted_grad)):
        assert (found.float() - other).abs().max() <= 2**-8 * other.abs().max() and found.float().norm() > 0
    assert (out.float() - x.detach().float() @ weight.float().T).norm() < 0.05 * out.float().norm()


def test_kept_transposed_or_not_the_gradients_are_the_same_to_the_bit():
    grads = []
    for twice in (False, True):
        model = llama()
        assert fp8.round_layers(model, twice) == (14, 0)
        assert (model.model.layers[0].mlp.up_proj.transposed is not None) == twice
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        ids = torch.arange(20)[None]
        adapted(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_layers_keep_shape_type_and_bias_and_no_weight_that_could_be_used_unseen():
    model = llama(intermediate_size=72, attention_bias=True)  # 72 is no multiple of 16
    biases = [torch.nn.init.normal_(m.bias) for m in model.modules() if getattr(m, "bias", None) is not None]
    whole, ids = model(input_ids=torch.arange(30)[None]).logits, torch.arange(30)[None]
    head = model.lm_head.weight.clone()
    assert fp8.round_layers(model) == (8, 6) and len(biases) == 8
    layer = model.model.layers[0].self_attn.k_proj
    assert layer.weight.shape == (32, 64) and layer.weight.dtype == BF16 and layer.weight.isnan().all()
    assert layer.rounded.dtype == torch.float8_e4m3fn and layer.rounded.shape == (32, 64)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear and torch.equal(model.lm_head.weight, head)
    away = (model(input_ids=ids).logits - whole).float().norm() / whole.float().norm()
    assert 1e-3 < away < 0.1
    with torch.no_grad(), fp8.inputs_in_16_bits(model):
        closer = (model(input_ids=ids).logits - whole).float().norm() / whole.float().norm()
    assert closer < away and torch.isfinite(closer) and "forward" not in vars(layer)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                                     ["q_proj", "v_proj", "up_proj"]], ids=["all", "some"])  # fmt: skip
def test_fused_layers_compute_what_the_layers_do_one_by_one(targets):
    model = llama()
    fp8.round_layers(model)
    attention = model.model.layers[0].self_attn
    assert fp8.joined([attention.q_proj, attention.k_proj, attention.v_proj]) and not fp8.joined([attention.q_proj])
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = adapted(input_ids=ids).logits.float()
        with fused_inference(model):
            fused = adapted(input_ids=ids).logits.float()
    assert 0 < (plain - fused).norm() < 0.04 * plain.norm()  # a last bit of bfloat16 moves a number to the next of e4m3


# ------------------------------------------------------------------------------------------ the check of the first rows


def test_the_check_of_the_first_rows_takes_no_noise_for_a_leak_and_still_finds_one():
    model = AutoModelForCausalLM.from_pretrained(local_model(TINY_RANDOM), dtype=BF16)
    install(model)
    fp8.round_layers(model)
    made = torch.Generator().manual_seed(1)
    rows = [torch.randint(10, 4096, (count,), generator=made).tolist() for count in (40, 60, 90)]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]
    check = functools.partial(acceleration._difference, model, rows, 0, BF16)
    with fp8.inputs_in_16_bits(model):
        assert check() == ""

        def leak(module, inputs, output):
            return output + 0.1 * torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)

        model.model.layers[0].mlp.register_forward_hook(leak)
        assert "a row would see another one" in check()


# ------------------------------------------------------------------------------------------ runs and exports


@pytest.mark.usefixtures("forked_children")
@pytest.mark.parametrize(
    "method",
    [(), ("method=dpo", "dataset=twist_pairs", "dataset.max_rows=24"),
     ("method=grpo", "dataset=sums", "dataset.max_rows=24", "method.num_generations=2", "method.max_completion_length=8",
      "method.reward_funcs=[{folder}/rewards.py:letters]", "method.reward_weights=[1]")],
    ids=["sft", "dpo", "grpo"],
)  # fmt: skip
def test_a_run_says_what_rounding_costs_and_its_merged_model_holds_the_weights_as_they_were(method, tmp_path):
    (tmp_path / "rewards.py").write_text("def letters(completion, row):\n    return sum(map(ord, completion)) % 17 / 17\n")
    method = [word.replace("{folder}", str(tmp_path)) for word in method]
    result = run(make_settings(*JOB, *method, "export=merged_16bit"), tmp_path)
    assert (result.status, result.exit_code) == ("finished", 0)
    said = read_json(tmp_path / "run.json")["model"]["fp8"]
    assert said["layers"] == 14 and said["not_rounded"] == 0
    of_answers = "method=grpo" not in method  # whose held-out rows are prompts
    assert ("loss_in_fp8" in said) == of_answers
    proof = read_json(tmp_path / "export" / "verify.json")
    assert {name: found["status"] for name, found in proof["artifacts"].items()} == {"adapter": "ok", "merged_16bit": "ok"}
    assert proof["as_trained"]["loss"] != proof["reference"]["loss"]
    if of_answers:
        assert 0 < abs(said["loss_in_fp8"] - said["loss_in_16_bits"]) < 0.01
        assert proof["as_trained"]["base_loss"] == said["loss_in_fp8"]
        assert proof["reference"]["base_loss"] == said["loss_in_16_bits"]
    model = AutoModelForCausalLM.from_pretrained(local_model(TINY_RANDOM), dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(local_model(TINY_RANDOM), dtype=BF16).float()
    model.load_state_dict(base.state_dict())
    wanted = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "export" / "merged_16bit" / "model.safetensors")
    assert all(torch.equal(merged[name], wanted[name].to(BF16)) for name in merged if "proj" in name)
    assert any(not torch.equal(merged[name], base.state_dict()[name].to(BF16)) for name in merged if "proj" in name)


def test_a_run_that_was_cut_and_resumed_ends_as_the_whole_one(tmp_path):
    whole, cut, job = tmp_path / "whole", tmp_path / "cut", make_settings(*JOB, "trainer.save_steps=2")
    assert run(job, whole).exit_code == 0
    shutil.copytree(whole, cut)
    (cut / "run.json").write_text(json.dumps({**read_json(whole / "run.json"), "status": "running"}), encoding="utf-8")
    shutil.rmtree(checkpoint.place_of(cut, 4))
    shutil.rmtree(cut / "adapter")
    assert run(job, cut).exit_code == 0
    assert read_json(cut / "run.json")["sessions"][-1]["from"] == "checkpoint-2" and compare(whole, cut) == []


def test_a_run_of_a_gpu_is_used_as_it_was_before_the_rounding_where_there_is_no_fp8(caplog):
    settings = make_settings(*SMALL, "model.load_in_fp8=true")  # of a GPU: on a CPU `auto` is float32
    model, _ = loading.load_model(settings, plan_saved(settings))
    assert not any(isinstance(module, fp8.Fp8Linear) for module in model.modules())
    assert "stays in float32, other than as it was trained" in caplog.text


@pytest.mark.usefixtures("forked_children")
def test_two_processes_learn_what_one_does(tmp_path):
    job = (*JOB, "trainer.per_device_train_batch_size=2", "trainer.effective_batch_size=4")
    one = run(make_settings(*job), tmp_path / "one")
    two = launch(make_settings(*job, "distributed.num_processes=2"), tmp_path / "two", Context())
    assert (one.status, two.status) == ("finished", "finished")
    losses = [[line.get("loss", line.get("eval_loss")) for line in read_lines(tmp_path / name / "metrics.jsonl")]
              for name in ("one", "two")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_rounded_weights_are_not_sent_to_other_processes(tmp_path):
    """They have no memory of their own, and torch refuses to write there."""
    from types import SimpleNamespace

    base = llama()
    fp8.round_layers(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="single memory location"):
            torch.nn.parallel.DistributedDataParallel(model)
        settle_accelerator(SimpleNamespace(state=None), model)
        synced = torch.nn.parallel.DistributedDataParallel(model)
        assert len(synced.parameters_to_ignore) == 14 and all("weight" in name for name in synced.parameters_to_ignore)
    finally:
        torch.distributed.destroy_process_group()


def test_jobs_of_a_sweep_share_the_rounded_model(tmp_path):
    alone = run(make_settings(*JOB, "lora.r=4"), tmp_path / "alone").metric
    warm_cache.keep(True)
    before = warm_cache.loads["model"]
    try:
        results = []
        for rank in (8, 4):
            results.append(run(make_settings(*JOB, f"lora.r={rank}"), tmp_path / f"{rank}").metric)
            warm_cache.release()
        assert warm_cache.loads["model"] == before + 1
    finally:
        warm_cache.keep(False)
    assert results[1] == alone != results[0]
