"""Hints of rules between settings, typed: the command gets further, whatever of a group was said by itself."""

import pytest

from sft.config import rules
from sft.config.rules import check_settings
from sft.errors import Problem, Refusal
from tests.conftest import make_settings
from tests.hints import hints_of, type_hints

DPO, TWO = "method=dpo", "distributed.num_processes=2"

CASES = [
    (["method.beta=0.3"], "belongs to method=dpo"),
    ([DPO, "method.beta=0"], "above 0"),
    ([DPO, "method.sft_weight=-1"], "at least 0"),
    ([DPO, "method.label_smoothing=0.7"], "below 0.5"),
    ([DPO, "method.label_smoothing=0.7", "method.loss_type=robust"], "below 0.5"),
    ([DPO, "method.label_smoothing=0.1"], "does not read it"),
    ([DPO, "model.backend=unsloth"], "pairs are computed by"),
    ([DPO, "dataset.loss_on=all"], "Only the two answers"),
    ([DPO, "dataset.shape=messages"], "chosen and rejected"),
    ([DPO, "dataset.reasoning=split"], "one answer that is trained on"),
    ([DPO, "lora.lora_dropout=0.1"], "no dropout"),
    (["method.reference=base"], "belongs to method=dpo"),
    ([DPO, "method.reference=base", "lora=none"], "no adapter to switch off"),
    ([DPO, "method.reference=base", "lora.extra.init_lora_weights=pissa"], "taken out of the model's weights"),
    ([DPO, "method.reference=base", "lora.bias=all"], "weights of the model itself"),
    ([DPO, "distributed=fsdp", TWO], "not shared out"),
    (["distributed.num_processes=0"], "at least 1"),
    (["distributed.strategy=fsdp"], "nothing to share"),
    (["distributed=fsdp", "distributed.num_processes=1"], "nothing to share"),
    (["distributed=fsdp", TWO, "model.load_in_4bit=true"], "not shared out"),
    (["distributed=fsdp", TWO, "model.backend=unsloth"], "whole weights"),
    ([TWO, "trainer.extra.train_sampling_strategy=group_by_length"], "would not train on the rows"),
    (["preflight.gpu=h100"], "would be ignored"),
    (["export.gguf.adapter=true"], "No GGUF files"),
    (["export=gguf", "lora=none", "export.gguf.adapter=true"], "no adapter"),
    (["export=gguf", "export.gguf.quantizations=[]"], "No GGUF type"),
    (["export=adapter", "lora=none"], "no adapter"),
    (["export.hub.repo=me/x"], "nothing would be pushed"),
    (["tracking.entity=team/proj"], "name has"),
    ([f"tracking.tags=[ok,{'t' * 65}]"], "tag"),
    (["tracking.log_adapter=true", "lora=none"], "adapter"),
    (['lora.target_modules=["(x"]'], "Not a regular expression"),
    (["lora.extra.rank_pattern={q_proj:0,v_proj:2}"], "at least 1"),
    (["lora.extra.init_lora_weights=pissa", "model.load_in_4bit=true"], "rounded to 4 bits"),
]

MACHINES = [
    (["distributed.num_processes=auto"], 0, "none is found here"),
    (["distributed=fsdp"], 0, "none is found here"),
    (["distributed=fsdp"], 1, "nothing to share"),
    (["distributed.num_processes=4"], 2, "a GPU of its own"),
    (["model.load_in_8bit=true"], 0, "need an NVIDIA GPU"),
    (["trainer.optim=paged_adamw_8bit"], 0, "needs an NVIDIA GPU"),
    (["model.dtype=float16"], 0, "needs a GPU"),
    (["model.attn_implementation=flash_attention_2"], 1, "flash-attn is not installed"),
    (["model.backend=unsloth", "lora.use_dora=true"], 1, "no DoRA"),
    (["model.backend=unsloth", "lora.extra.rank_pattern={q_proj:4}"], 1, "adapters of its own"),
]


def problems_of(argv: list[str], hardware: bool = False) -> list[Problem]:
    try:
        return check_settings(make_settings(*argv), hardware)
    except Refusal as refusal:
        return refusal.problems


@pytest.mark.parametrize(("argv", "words"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_the_hint_of_a_rule_gets_the_command_further(argv, words):
    problems = problems_of(argv)
    assert any(words in problem.why for problem in problems) and any(map(hints_of, problems)), problems
    type_hints(argv, problems, problems_of)


@pytest.mark.parametrize(("argv", "gpus", "words"), MACHINES, ids=str)
def test_the_hint_of_a_rule_about_the_machine_gets_the_command_further(monkeypatch, argv, gpus, words):
    monkeypatch.setattr(rules, "gpu_present", lambda: gpus > 0)
    monkeypatch.setattr(rules, "gpu_count", lambda: gpus)
    problems = problems_of(argv, True)
    assert any(words in problem.why for problem in problems) and any(map(hints_of, problems)), problems
    type_hints(argv, problems, lambda command: problems_of(command, True))
