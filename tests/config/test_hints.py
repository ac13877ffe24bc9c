"""Hints of rules between settings, typed: the command gets further, whatever of a group was said by itself."""

import pytest

from sft.config import rules
from sft.config.rules import check_settings
from sft.errors import Problem, Refusal
from tests.conftest import make_settings
from tests.hints import hints_of, type_hints

DPO, GRPO, TWO = "method=dpo", "method=grpo", "distributed.num_processes=2"

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
    ([DPO, "method.loss_type=dapo"], "method=dpo has sigmoid"),
    ([DPO, "method.num_generations=4"], "belongs to method=grpo"),
    (["method.temperature=0.7"], "belongs to method=grpo"),
    (["dataset.columns.answer=solution"], "belongs to method=grpo"),
    ([GRPO, "method.loss_type=ipo"], "method=grpo has dapo"),
    ([GRPO, "method.sft_weight=1"], "belongs to method=dpo"),
    ([GRPO, "method.label_smoothing=0.1"], "belongs to method=dpo"),
    ([GRPO, "method.beta=-1"], "at least 0"),
    ([GRPO, "method.num_generations=1"], "at least 2"),
    ([GRPO, "method.max_completion_length=0"], "at least 1"),
    ([GRPO, "method.max_completion_length=2048"], "no token is left"),
    ([GRPO, "method.temperature=0"], "above 0"),
    ([GRPO, "method.epsilon=1"], "below 1"),
    ([GRPO, "method.epsilon_high=0"], "or null"),
    ([GRPO, "method.num_iterations=0"], "at least 1"),
    ([GRPO, "method.max_idle_steps=0"], "at least 1"),
    ([GRPO, "model.backend=unsloth"], "completions are written"),
    ([GRPO, "dataset.loss_on=all"], "its own completions"),
    ([GRPO, "dataset.overlong=truncate"], "another question"),
    ([GRPO, "dataset.shape=text"], "no prompt"),
    ([GRPO, "dataset.reasoning=split"], "one prompt"),
    ([GRPO, "lora.lora_dropout=0.1"], "without dropout"),
    ([GRPO, "distributed=fsdp", TWO], "all of the weights"),
    ([GRPO, "method.beta=0.04", "lora=none"], "no adapter to switch off"),
    ([GRPO, "method.beta=0.04", "lora.extra.init_lora_weights=pissa"], "taken out of the model's weights"),
    ([GRPO, "method.beta=0.04", "lora.start_from=me/adapter"], "is gone"),
    ([GRPO, "method.reference=base"], "no reference is read"),
    ([GRPO, "dataset=gsm8k"], "none is named"),
    ([GRPO, "method.reward_funcs=[numbr]"], "No such reward"),
    ([GRPO, "method.reward_funcs=[number,number]"], "told apart"),
    ([GRPO, "method.reward_weights=[1]"], "2 rewards"),
    ([GRPO, "method.reward_weights=[0,0]"], "not all of them 0"),
    ([GRPO, "method.reward_funcs=[regex]"], "needs its option"),
    ([GRPO, "method.reward_funcs=[length]", "method.reward_options={lenght:{words:3}}"], "be ignored"),
    ([GRPO, "method.reward_funcs=[length]", "method.reward_options={length:{word:3}}"], "no such option"),
    ([GRPO, "method.reward_funcs=[length]", "method.reward_options={length:{words:many}}"], "a whole number"),
    ([GRPO, "method.reward_funcs=[length]", "method.reward_options={length:{words:0}}"], "at least 1"),
    ([GRPO, "method.reward_funcs=[length]", "method.reward_options={length:3}"], "a table"),
    ([GRPO, "method.reward_funcs=[regex]", "method.reward_options={regex:{pattern:'(x'}}"], "regular expression"),
    ([GRPO, "method.reward_funcs=[json_schema]", "method.reward_options={json_schema:{typ:object}}"], "no such option"),
    ([GRPO, "method.reward_funcs=[contains]", "method.reward_options={contains:{text:' '}}"], "every completion"),
    ([GRPO, "trainer.extra.num_generations=4"], "setting of its own"),
    ([GRPO, "trainer.extra.loss_type=dapo"], "setting of its own"),
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
    (["report.against=nowhere"], "no such folder"),
    (["report.against=."], "no run.json"),
    ([f"report.against={'long' * 100}"], "cannot look it up"),
    (["model.load_in_fp8=true", "model.load_in_4bit=true", "model.load_in_8bit=true"], "one way only"),
    (["model.load_in_fp8=true", "model.backend=unsloth"], "Unsloth's kernels"),
    (["model.load_in_fp8=true", "model.dtype=float16"], "bfloat16"),
    (["model.load_in_fp8=true", "distributed=fsdp"], "FP8 weights are not shared out"),
    (["model.load_in_fp8=true", "lora=none"], "cannot be trained themselves"),
    (["model.load_in_fp8=true", "lora.use_dora=true"], "DoRA computes with the weights"),
    (["model.load_in_fp8=true", "lora.extra.init_lora_weights=olora"], "rounded anew"),
    (["model.load_in_fp8=true", "lora.modules_to_save=[lm_head,v_proj]"], "cannot be trained themselves"),
    (["model.load_in_fp8=true", "lora.extra.target_parameters=[mlp.experts.down_proj]"], "adapter on a parameter"),
]

MACHINES = [
    (["distributed.num_processes=auto"], 0, "none is found here"),
    (["distributed=fsdp"], 0, "none is found here"),
    (["distributed=fsdp"], 1, "nothing to share"),
    (["distributed.num_processes=4"], 2, "a GPU of its own"),
    (["model.load_in_8bit=true"], 0, "need an NVIDIA GPU"),
    (["model.load_in_fp8=true"], 0, "FP8 needs an NVIDIA GPU"),
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


EXTRA = [
    ("top_p=0.9", "another sampler"), ("top_k=5", "another sampler"), ("min_p=0.1", "another sampler"),
    ("repetition_penalty=1.1", "another sampler"), ("steps_per_generation=4", "count prompts"),
    ("generation_batch_size=8", "count prompts"), ("vllm_mode=colocate", "no second engine"),
    ("use_vllm=true", "no second engine"), ("sync_ref_model=true", "without its adapter"),
    ("ref_model_mixup_alpha=0.5", "without its adapter"), ("use_liger_kernel=true", "without logits"),
    ("neftune_noise_alpha=5", "supervised fine-tuning"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "words"), EXTRA)
def test_an_option_of_trls_grpo_without_a_place_here_is_refused_with_its_reason(option, words):
    (problem,) = problems_of([GRPO, f"trainer.extra.{option}"])
    assert words in problem.why and problem.fix == f"leave trainer.extra.{option.partition('=')[0]} out"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{type:objekt}", "none of object, array"),
        ("{properties:{a:{typ:string}}}", "The schema.a has 'typ'; what is known is type"),
        ("{items:{properties:{a:3}}}", "The schema.items.a has to be a table"),
        ("{required:[1]}", "list of names"),
        ("{items:{enum:3}}", "The schema.items.enum has the wrong type"),
    ],
)
def test_a_schema_with_what_is_not_known_is_refused(schema, words):
    argv = [GRPO, "method.reward_funcs=[ends,json_schema]", f"method.reward_options={{json_schema:{schema}}}"]
    (problem,) = problems_of(argv)
    assert words in problem.why


OWN = [
    ("gone_entirely.py:polite", "no such file"),
    ("rewards.py:polit", "no such function"),
    ("broken.py:polite", "no Python"),
    ("rewards.py", "by its file and its function"),
    ("rewards:polite", "by its file and its function"),
]


@pytest.mark.parametrize(("name", "words"), OWN)
def test_a_reward_of_ones_own_that_cannot_be_found_is_refused_with_what_was_meant(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def polite(completion, row):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("def polite(completion, row)\n")
    argv = [GRPO, f"method.reward_funcs=[ends,'{name}']", "method.reward_weights=[]"]
    problems = problems_of(argv)
    assert [words in problem.why for problem in problems] == [True]
    type_hints(argv, problems, problems_of)


def test_a_reward_of_ones_own_is_taken_without_being_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("raise SystemExit\ndef polite(completion, row):\n    return 1.0\n")
    assert problems_of([GRPO, "method.reward_funcs=[ends,'rewards.py:polite']"]) == []


def test_the_demo_of_rewards_composes_from_one_word():
    settings = make_settings(GRPO)
    method, trainer = settings.method, settings.trainer
    assert check_settings(settings, False) == []
    assert (settings.dataset.name, method.reward_funcs, method.reward_weights) == ("sums", ["number", "ends"], [0.8, 0.2])
    assert (method.loss_type.value, method.beta, method.max_completion_length) == ("dapo", 0, 12)
    assert (trainer.learning_rate, trainer.max_steps, trainer.effective_batch_size, trainer.eval_steps) == (3e-4, 75, 2, 0.5)


def test_another_model_and_data_set_take_nothing_from_the_demo():
    settings = make_settings(GRPO, "model=qwen3_4b", "dataset=gsm8k", "method.reward_funcs=[number]")
    method, trainer = settings.method, settings.trainer
    assert check_settings(settings, False) == []
    assert (method.reward_weights, method.max_completion_length) == ([], 256)
    assert (trainer.learning_rate, trainer.max_steps, trainer.effective_batch_size, trainer.eval_steps) == (5e-6, -1, 8, None)


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
