"""Every option of every group composes, and every preset that can run without a hub or a GPU runs on the tiny model."""

import json
from pathlib import Path

import pytest

from sft.config.rules import check_settings
from sft.config.schema import GROUPS
from sft.config.tracking_rules import check_packages
from sft.data.prepare import prepare
from sft.lifecycle import run
from tests.conftest import ROOT, SMALL, make_settings
from tests.data.miniatures import assistant, user

OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]
TINY = (*SMALL, "trainer.max_steps=2", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1",
        "samples.num_held_out=1", "samples.max_new_tokens=4")  # fmt: skip
ON_THE_CPU = ("model.load_in_4bit=false", "trainer.optim=adamw_torch", "trainer.gradient_checkpointing=false")

INSTRUCTIONS = [{"instruction": f"问题 {i}?", "input": "", "output": f"Answer {i}."} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"},
                  {"role": "user", "content": "more"}, {"role": "assistant", "content": "done"}]}
    for i in range(8)
]  # fmt: skip
PAIRS = {
    "twist_pairs": [{"prompt": f"Q{i}?", "chosen": f"A{i}.", "rejected": f"B{i}."} for i in range(8)],
    "ultrafeedback_binarized": [
        {"prompt": f"Q{i}?", "prompt_id": f"{i:064x}", "chosen": (chosen := [user(f"Q{i}?"), assistant(f"A{i}.")]),
         "rejected": [user(f"Q{i}?"), assistant(f"B{i}.")], "messages": chosen, "score_chosen": 8.0, "score_rejected": 5.5}
        for i in range(8)
    ],
    "dpo_mix_zh": [
        {"conversations": [{"from": "human", "value": f"问题 {i}？"}], "chosen": {"from": "gpt", "value": f"答 {i}。"},
         "rejected": {"from": "gpt", "value": f"错 {i}。"}}
        for i in range(8)
    ],
}  # fmt: skip
"""Rows in the layout of the sets of pairs."""

GSM8K = [{"question": f"Q{i}?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(8)]


def write(folder: Path, rows: list[dict]) -> str:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return f"dataset.path={file}"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_every_option_composes_and_passes_the_rules(group, option):
    settings = make_settings(
        f"{group}={option}", *(["dataset.path=README.md"] if (group, option) == ("dataset", "local") else [])
    )
    problems = [p for p in check_settings(settings, hardware=False) if "README.md" not in p.what]
    assert problems == []


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_every_option_opens_with_its_command_and_its_purpose(group, option):
    lines = (ROOT / "conf" / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("# @package")]
    assert lines[0].startswith("# python train.py") and f"{group}={option}" in lines[0]
    assert lines[1].startswith("# ") and len(lines[1]) > 8


@pytest.mark.parametrize("option", [o for g, o in OPTIONS if g == "lora"])
def test_every_lora_preset_trains(option, tmp_path):
    assert run(make_settings(f"lora={option}", *TINY), tmp_path).status == "finished"


@pytest.mark.parametrize("option", [o for g, o in OPTIONS if g == "trainer"])
def test_every_trainer_preset_trains(option, tmp_path):
    assert run(make_settings(f"trainer={option}", *TINY), tmp_path).status == "finished"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what trackers themselves use
@pytest.mark.parametrize("option", [o for g, o in OPTIONS if g == "tracking"])
def test_every_tracking_preset_runs(option, tmp_path, monkeypatch, caplog):
    if missing := check_packages(make_settings(f"tracking={option}")):
        pytest.skip(f"{missing[0].why} {missing[0].fix}")
    monkeypatch.chdir(tmp_path)
    words = ["tracking.mode=offline"] if option == "wandb_agent" else []  # it asks for a server
    assert run(make_settings(*TINY, f"tracking={option}", *words), tmp_path).status == "finished"
    assert "could not" not in caplog.text, "the tracker was not left out"


@pytest.mark.parametrize("option", [o for g, o in OPTIONS if g == "dataset"])
def test_every_dataset_preset_trains_on_rows_of_its_shape(option, tmp_path):
    rows = CHATS if option == "ultrachat" else (PAIRS | {"gsm8k": GSM8K}).get(option, INSTRUCTIONS)
    place = [] if option == "twists" else [write(tmp_path, rows), "dataset.eval_split=null", "dataset.eval_fraction=0.25"]
    place += ["method=dpo"] if option in PAIRS else []
    result = run(make_settings(*TINY, f"dataset={option}", *place), tmp_path / "run")
    assert result.status == "finished"
    text = json.loads((tmp_path / "run" / "preflight.json").read_text(encoding="utf-8"))["examples"][0]["text"]
    assert text.startswith("Below is an instruction" if option in ("ruozhiba", "alpaca_cleaned") else "<|im_start|>system")


@pytest.mark.parametrize(
    ("option", "question", "answers"),
    [("ultrafeedback_binarized", "Q0?", ["A0.", "B0."]), ("dpo_mix_zh", "问题 0？", ["答 0。", "错 0。"])],
)
def test_a_preset_of_pairs_reads_the_layout_of_its_set(tmp_path, loaded_tokenizer, option, question, answers):
    place = (write(tmp_path, PAIRS[option]), "dataset.eval_split=null", "dataset.eval_fraction=0", "dataset.shuffle=false")
    prepared = prepare(make_settings("method=dpo", f"dataset={option}", *place), *loaded_tokenizer)
    pair, tokenizer = prepared.train[0], loaded_tokenizer[0]
    for ids, answer in zip((pair["input_ids"], pair["rejected_ids"]), answers, strict=True):
        whole = tokenizer.apply_chat_template([user(question), assistant(answer)], tokenize=False)
        assert tokenizer.decode(ids) == whole.removesuffix("\n")
    assert prepared.facts["pairs"]["pairs"] == 8 and prepared.facts["pairs"]["equal_pairs"] == 0


@pytest.mark.parametrize("option", [o for g, o in OPTIONS if g == "experiment"])
def test_every_experiment_trains_on_rows_of_its_shape(option, tmp_path):
    rows = CHATS if option == "chat" else INSTRUCTIONS
    place = [write(tmp_path, rows), "dataset.eval_split=null", *(["dataset.eval_fraction=0.25"] if option == "chat" else [])]
    overrides = [o for o in TINY if not o.startswith("model=")]
    settings = make_settings(f"experiment={option}", *overrides, *place, *ON_THE_CPU, "model.name=tiny_random")
    assert check_settings(settings) == []
    assert run(settings, tmp_path / "run").status == "finished"


def test_the_notebook_preset_has_the_notebooks_numbers():
    """Read off the Unsloth notebook "Llama-3 8b": loading, get_peft_model, and the training arguments."""
    s = make_settings("experiment=colab_notebook")
    assert (s.model.name, s.model.load_in_4bit, s.model.max_seq_length) == ("unsloth/llama-3-8b-bnb-4bit", True, 2048)
    assert (s.lora.r, s.lora.lora_alpha, s.lora.lora_dropout, s.lora.bias.value) == (16, 16, 0, "none")
    assert s.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    t = s.trainer
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps, t.warmup_steps, t.max_steps) == (2, 4, 5, 60)
    assert (t.learning_rate, t.optim, t.weight_decay, t.lr_scheduler_type) == (2e-4, "adamw_8bit", 0.01, "linear")
    assert (s.seed, s.dataset.loss_on.value, s.dataset.eval_fraction, s.dataset.shuffle) == (3407, "all", 0, False)
    assert (s.dataset.columns.instruction, s.dataset.columns.input, s.dataset.columns.output) == (None, "instruction", "output")
    assert t.gradient_checkpointing is True


def test_prequantised_names_follow_load_in_4bit():
    assert make_settings("model=qwen3_8b").model.name == "unsloth/Qwen3-8B-unsloth-bnb-4bit"
    assert make_settings("model=qwen3_8b", "model.load_in_4bit=false").model.name == "unsloth/Qwen3-8B"
    assert make_settings("model=qwen3_8b", "model.name=me/mine").model.name == "me/mine"
