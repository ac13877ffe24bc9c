"""sft init --from: notebooks and configs of other projects, in miniatures written for these tests."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sft.cli import init
from sft.cli.check import read_settings
from sft.cli.conversion import convert
from sft.cli.conversion.calls import read_calls
from sft.errors import Refusal
from sft.paths import CONF
from tests import forked
from tests.conftest import ROOT

SECRET = "hf_" + "a" * 24

AXOLOTL = """
base_model: someone/Some-1B
model_type: AutoModelForCausalLM
load_in_4bit: false
strict: false
datasets:
  - path: rows.jsonl
    ds_type: json
    type: alpaca
  - path: other/set
    type: alpaca
val_set_size: 0.2
adapter: lora
lora_model_dir:
sequence_len: 640
sample_packing: true
lora_r: 8
lora_alpha: 24
lora_dropout: 0.05
lora_target_linear: true
wandb_project: mine
gradient_accumulation_steps: 2
micro_batch_size: 3
num_epochs: 2
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 3e-4
train_on_inputs: true
bf16: auto
gradient_checkpointing: true
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_ratio: 0.1
saves_per_epoch: 1
adam_beta2: 0.95
fsdp:
hub_token: SECRET
""".replace("SECRET", SECRET)

LLAMAFACTORY = """
model_name_or_path: someone/Some-1B
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: mine
template: llama3
cutoff_len: 300
overwrite_cache: true
output_dir: saves/x
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.25
eval_strategy: steps
eval_steps: 5
mask_history: true
freeze_trainable_layers: 2
"""

CELLS = [
    f"""!pip install unsloth
from unsloth import FastLanguageModel
max_seq_length = 1024
dtype = None
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "someone/Some-1B", max_seq_length = max_seq_length, dtype = dtype, load_in_4bit = False, token = "{SECRET}")
""",
    """model = FastLanguageModel.get_peft_model(
    model, r = 8, target_modules = ["q_proj", "v_proj"], lora_alpha = 2 * 8, lora_dropout = 0, bias = "none",
    use_gradient_checkpointing = "unsloth", random_state = 11, use_rslora = True, loftq_config = None)
""",
    "what is no Python",
    '''prompt = """### Instruction:
{}
### Response:
{}"""
from datasets import load_dataset
dataset = load_dataset("json", data_files = "rows.jsonl", split = "train")
dataset = dataset.map(format_them, batched = True)
''',
    """open("EXECUTED", "w")
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = dataset, args = SFTConfig(
    per_device_train_batch_size = 2, gradient_accumulation_steps = 4, warmup_steps = 5, max_steps = 60, learning_rate = 3e-4,
    fp16 = not is_bfloat16_supported(), logging_steps = steps(), optim = "adamw_torch", weight_decay = 0.001,
    output_dir = "outputs", report_to = "none", neftune_noise_alpha = 5))
""",
    'model.save_pretrained_gguf("model", tokenizer, quantization_method = "q4_k_m")',
]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Path:
    """The three miniatures with their rows, in the working folder."""
    rows = [{"instruction": f"Do {n}.", "input": "", "output": f"Done {n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "axolotl.yml").write_text(AXOLOTL, encoding="utf-8")
    (tmp_path / "factory.yaml").write_text(LLAMAFACTORY, encoding="utf-8")
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "data/mine.jsonl")
    info = {"mine": {"file_name": "mine.jsonl", "columns": {"prompt": "instruction", "response": "output"}}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    write_notebook(tmp_path / "notebook.ipynb", *CELLS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_notebook(path: Path, *cells: str) -> None:
    code = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "# x"}, *code]}), encoding="utf-8")


def settings_of(name: str, *words: str):
    return read_settings(CONF, [f"experiment={name}", *words], hardware=False)


def refused(*argv: str) -> list[tuple[str, str]]:
    with pytest.raises(Refusal) as refusal:
        init.begin([*argv])
    return [(problem.what, problem.fix) for problem in refusal.value.problems]


def yaml_of(text: str, **changes) -> Path:
    """A config with these keys changed; None takes one out."""
    plain = {key: value for key, value in {**yaml.safe_load(text), **changes}.items() if value is not None}
    path = Path("changed.yaml")
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def test_an_axolotl_config_becomes_an_experiment(capsys):
    assert init.main(["--from", "axolotl.yml"]) == 0
    made = settings_of("axolotl")
    assert (made.model.name, made.model.max_seq_length, made.model.load_in_4bit) == ("someone/Some-1B", 640, False)
    assert (made.lora.r, made.lora.lora_alpha, made.lora.lora_dropout) == (8, 24, 0.05)
    assert made.lora.target_modules == ["all-linear"] and made.tracking.project == "mine"
    trainer = made.trainer
    assert (trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps, trainer.num_train_epochs) == (3, 2, 2)
    assert (trainer.learning_rate, trainer.warmup_steps, trainer.save_steps) == (3e-4, 0.1, 0.5)
    assert (trainer.lr_scheduler_type, trainer.optim, trainer.extra) == ("cosine", "adamw_torch", {"adam_beta2": 0.95})
    assert (made.dataset.path, made.dataset.template, made.dataset.eval_fraction) == ("rows.jsonl", "alpaca", 0.2)
    assert (made.dataset.loss_on.value, made.dataset.overlong.value, made.seed) == ("all", "drop", 42)
    needless, _, left = capsys.readouterr().out.partition("Not carried over:")
    for key in ("bf16", "flash_attention", "model_type", "strict", "fsdp"):
        assert f"\n  {key} " in needless
    for key in ("loss_watchdog_threshold", "datasets[2]: other/set", "sample_packing", "hub_token"):
        assert f"\n  {key} " in left


def test_a_llamafactory_config_becomes_an_experiment_with_its_defaults():
    assert init.main(["from=factory.yaml"]) == 0
    made = settings_of("factory")
    assert (made.model.max_seq_length, made.lora.r, made.lora.lora_alpha) == (300, 8, 16)
    assert made.lora.target_modules == ["q_proj", "v_proj"] and made.trainer.load_best_model_at_end is False
    assert (made.trainer.gradient_accumulation_steps, made.trainer.warmup_steps, made.trainer.eval_steps) == (8, 0.1, 5)
    assert (made.dataset.path, made.dataset.loss_on.value, made.dataset.eval_fraction) == ("data/mine.jsonl", "last", 0.25)
    text = Path("conf/experiment/factory.yaml").read_text(encoding="utf-8")
    assert "lora_alpha: 16" in text and "(lora_alpha, its default)" in text
    assert "# Not carried over: trust_remote_code, freeze_trainable_layers" in text


def test_a_notebook_becomes_an_experiment_and_is_not_run(files, capsys):
    assert init.main(["--from=notebook.ipynb"]) == 0
    made = settings_of("notebook")
    assert (made.model.name, made.model.max_seq_length, made.model.load_in_4bit) == ("someone/Some-1B", 1024, False)
    assert (made.lora.r, made.lora.lora_alpha, made.lora.use_rslora, made.seed) == (8, 16, True, 11)
    assert made.lora.target_modules == ["q_proj", "v_proj"] and made.trainer.gradient_checkpointing is True
    assert (made.trainer.max_steps, made.trainer.learning_rate, made.trainer.weight_decay) == (60, 3e-4, 0.001)
    assert made.trainer.extra == {"neftune_noise_alpha": 5} and made.tracking.tracker.value == "none"
    assert (made.dataset.path, made.dataset.template, made.dataset.loss_on.value) == ("rows.jsonl", "alpaca", "all")
    assert made.dataset.eval_fraction == 0
    left = capsys.readouterr().out.partition("Not carried over:")[2]
    for key in ("logging_steps", "map", "save_pretrained_gguf", "1 cells"):
        assert f"\n  {key} " in left
    assert not (files / "EXECUTED").exists()


@pytest.mark.parametrize("name", ["axolotl.yml", "factory.yaml"])
def test_every_key_of_a_config_is_carried_over_needless_or_left(name):
    made = convert(Path(name))
    told_of = " ".join([*made.sources.values(), *made.needless, *made.left])
    assert [key for key in yaml.safe_load(Path(name).read_text()) if key not in told_of] == []


@pytest.mark.parametrize("name", ["axolotl.yml", "notebook.ipynb"])
def test_a_secret_reaches_neither_the_preset_nor_the_terminal(name, capsys):
    assert init.main([f"from={name}"]) == 0
    [written] = Path("conf/experiment").iterdir()
    seen = capsys.readouterr()
    assert SECRET not in written.read_text(encoding="utf-8") + seen.out + seen.err


def test_a_secret_in_place_of_a_value_is_left_out():
    made = convert(yaml_of(AXOLOTL, wandb_project=SECRET))
    assert "tracking.project" not in made.values and "secret" in made.left["wandb_project"]


def test_preferences_and_rewards_are_converted_with_their_settings():
    pairs = convert(yaml_of(LLAMAFACTORY, stage="dpo", pref_beta=0.3, pref_loss="ipo", mask_history=None))
    assert pairs.choices["method"] == "dpo" and pairs.values["method.beta"] == 0.3 and pairs.values["method.loss_type"] == "ipo"
    entry = [{"path": "rows.jsonl", "type": "chatml.intel"}]
    pairs = convert(yaml_of(AXOLOTL, rl="dpo", datasets=entry, train_on_inputs=None))
    assert pairs.choices["method"] == "dpo" and pairs.values["dataset.columns.prompt"] == "question"
    trl = {"beta": 0.0, "num_generations": 4, "reward_funcs": ["mine.f"], "use_vllm": True}
    rewards = convert(yaml_of(AXOLOTL, rl="grpo", trl=trl))
    assert rewards.values["method.num_generations"] == 4 and {"trl.reward_funcs", "trl.use_vllm"} <= rewards.left.keys()
    write_notebook(
        Path("grpo.ipynb"), CELLS[0], CELLS[1], CELLS[3],
        "trainer = GRPOTrainer(model = model, reward_funcs = [f], train_dataset = dataset, args = GRPOConfig("
        "num_generations = 4, per_device_train_batch_size = 8, gradient_accumulation_steps = 2, max_completion_length = 99))",
    )  # fmt: skip
    rewards = convert(Path("grpo.ipynb"))
    assert rewards.choices["method"] == "grpo" and "reward_funcs" in rewards.left
    assert rewards.values["trainer.effective_batch_size"] == 4  # 16 completions of 4 prompts
    assert rewards.values["method.max_completion_length"] == 99 and rewards.values["trainer.learning_rate"] == 1e-6
    assert refused("from=grpo.ipynb")[0][0] == "method.reward_funcs=[]"
    assert init.main(["from=grpo.ipynb", "method.reward_funcs=[number,ends]"]) == 0
    assert settings_of("grpo").method.reward_funcs == ["number", "ends"]


def test_whole_models_other_data_and_held_out_data_are_converted():
    whole = convert(yaml_of(LLAMAFACTORY, finetuning_type="full"))
    assert whole.choices["lora"] == "none" and not any(key.startswith("lora.") for key in whole.values)
    entry = [{"path": "owner/set", "name": "en", "split": "train[:500]", "type": "chat_template", "field_messages": "talk"}]
    hub = convert(yaml_of(AXOLOTL, datasets=entry, test_datasets=[{"path": "owner/set", "split": "test"}], val_set_size=0))
    values = {key.removeprefix("dataset."): value for key, value in hub.values.items() if key.startswith("dataset.")}
    assert (values["name"], values["config_name"], values["split"], values["eval_split"]) == (
        "owner/set", "en", "train[:500]", "test",
    )  # fmt: skip
    assert (values["columns.messages"], values["template"], values["eval_fraction"]) == ("talk", "chat", 0.0)
    four = convert(yaml_of(LLAMAFACTORY, quantization_bit=4, val_size=30))
    assert four.values["model.load_in_4bit"] is True and four.values["dataset.max_eval_rows"] == 30


def test_a_value_that_is_refused_here_is_left_out_with_the_reason(capsys):
    assert init.main([f"from={yaml_of(AXOLOTL, optimizer='muon_of_tomorrow', lora_dropout=1.5)}", "name=x"]) == 0
    left = capsys.readouterr().out.partition("Not carried over:")[2]
    assert "trainer.optim is refused" in left and "lora.lora_dropout is refused" in left
    assert settings_of("x").trainer.optim == "adamw_torch"


def test_words_that_are_typed_win_over_the_config():
    assert (
        init.main(["from=axolotl.yml", "model=tiny_random", "lora.r=4", "tracking=none", "data=data/mine.jsonl", "name=x"]) == 0
    )
    made = settings_of("x")
    assert (made.model.name, made.lora.r, made.tracking.tracker.value) == ("tiny_random", 4, "none")
    assert made.dataset.path == "data/mine.jsonl" and made.model.max_seq_length == 640
    assert init.main(["from=axolotl.yml", "lora=none", "name=y"]) == 0 and settings_of("y").lora.enabled is False
    assert "lora_r" not in Path("conf/experiment/y.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "argv, what, fix",
    [
        (["from=axolotl.yaml"], "from=axolotl.yaml", "from=axolotl.yml"),
        (["from=rows.jsonl"], "from=rows.jsonl", ""),
        (["from=empty.yaml"], "from=empty.yaml", "data=my_data.jsonl   to begin with a file of rows"),
        (["from=list.yaml"], "from=list.yaml", "data=my_data.jsonl   to begin with a file of rows"),
        (["from=broken.yaml"], "from=broken.yaml", "mend the file"),
        (["from=tag.yaml"], "from=tag.yaml", "mend the file"),
        (["from=broken.ipynb"], "from=broken.ipynb", "save it as .ipynb again"),
        (["from=other.ipynb"], "from=other.ipynb", "data=my_data.jsonl   to begin with a file of rows"),
        (["from=kto.yaml"], "rl: kto", "goal=preferences   or   goal=answer"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_file_that_cannot_be_converted_is_refused(argv, what, fix):
    Path("empty.yaml").write_text("a: 1\n")
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("tag.yaml").write_text("a: !!python/object/apply:os.system [touch EXECUTED]\n")
    Path("broken.ipynb").write_text("{")
    write_notebook(Path("other.ipynb"), "x = 1")
    shutil.move(yaml_of(AXOLOTL, rl="kto"), "kto.yaml")
    found = refused(*argv)
    assert found[0][0] == what and (not fix or found[0][1] == fix)
    assert not Path("EXECUTED").exists() and not Path("conf").exists()


def test_what_is_wrong_with_the_config_and_with_the_words_comes_at_once():
    path = yaml_of(AXOLOTL, rl="kto")
    assert [what for what, _ in refused(f"from={path}", "lora.rr=8", "name=null")] == ["name=null", "rl: kto", "lora.rr=8"]


def test_rows_that_are_elsewhere_are_named_by_hand():
    shutil.rmtree("data")
    assert refused("from=factory.yaml") == [("from=factory.yaml", "data=my_data.jsonl   or   dataset.name=<id on the hub>")]
    assert init.main(["from=factory.yaml", "data=rows.jsonl"]) == 0 and settings_of("factory").dataset.path == "rows.jsonl"
    assert init.main(["from=factory.yaml", "dataset.name=owner/set", "name=hub"]) == 0
    assert settings_of("hub").dataset.name == "owner/set"


def test_texts_of_somebody_else_stay_texts():
    """A name in a comment, or a text of several lines, could be settings of its own."""
    evil = "x\nmodel:\n  trust_remote_code: true\n#"
    path = yaml_of(
        AXOLOTL, **{evil: 1, "default_system_message": f"One.\n\n  Two: {{a}} ${{b}} {evil}", "wandb_name": "a: b # c"}
    )
    assert init.main([f"from={path}", "name=x", f"data={Path('rows.jsonl')}"]) == 0
    made = settings_of("x")
    assert made.model.trust_remote_code is False and made.tracking.name == "a: b # c"
    assert made.dataset.system_prompt == f"One.\n\n  Two: {{a}} ${{b}} {evil}"


@pytest.mark.parametrize("text", [AXOLOTL, LLAMAFACTORY], ids=["axolotl", "factory"])
def test_a_value_of_another_kind_is_refused_or_left_and_never_a_traceback(text):
    for key in yaml.safe_load(text):
        for value in ([1], {"a": [2]}, "x y", -3, [{"path": {}}], True, 1e400):
            try:
                made = convert(yaml_of(text, **{key: value}))
                assert made.values
            except Refusal as refusal:
                assert refusal.problems[0].fix


def test_commands_of_jupyter_and_calls_that_are_switched_off_are_passed_over():
    write_notebook(
        Path("n.ipynb"),
        "%%capture\nif True:\n    !pip install x \\\n      'y'\nf()",
        "%%bash\necho 1 )",
        "if False: g()\nelse:\n  h()",
        "if 1: i()",
    )
    source = read_calls(Path("n.ipynb"))
    assert [call.name for call in source.calls] == ["f", "h", "i"] and source.unread == 0


def test_values_of_a_notebook_are_worked_out_from_constants_alone():
    write_notebook(Path("n.ipynb"), "a = 4\nb = [a, -a, a * 2 / 4]\nf(b, c = {'x': a}, d = g(1), e = a // 0, h = unknown)")
    call = next(call for call in read_calls(Path("n.ipynb")).calls if call.name == "f")
    assert call.positional == [[4, -4, 2.0]] and call.given["c"] == {"x": 4}
    assert {type(call.given[name]).__name__ for name in "deh"} == {"Unknown"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["axolotl.yml", "factory.yaml", "notebook.ipynb"])
def test_what_was_converted_trains_two_steps(files, name):
    assert init.main([f"from={name}", "name=x"]) == 0
    words = ["experiment=x", "model.name=tiny_random", "trainer.max_steps=2", "tracking.tracker=none", "samples.num_held_out=0"]
    done = forked.run(ROOT / "train.py", *words, cwd=files)
    assert done.returncode == 0, done.stderr
    [record] = files.glob("outputs/*/run.json")
    run = json.loads(record.read_text(encoding="utf-8"))
    assert run["status"] == "finished" and run["settings"]["lora"]["r"] == 8
