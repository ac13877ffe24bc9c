"""Runs of method=dpo: they lower their loss, go on bit for bit after a cut, export what was trained, share their reference."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft.lifecycle
from sft.errors import Refusal
from sft.export import exporter, gguf, measure
from sft.launch.ranks import launch
from sft.lifecycle import run
from sft.methods import dpo
from sft.model import builtin, hub
from sft.runs.record import Context
from sft.signals import StopRequest
from sft.storage.cache import cache_dir
from sft.tracking.base import Trackers
from sft.training.metrics import Recorder
from tests.conftest import make_settings
from tests.faults.fault_campaign import MEASURED, compare, weights_hash
from tests.integration.test_nonfinite import quick_report  # noqa: F401

needs_gguf = pytest.mark.skipif(bool(gguf.missing_parts()), reason=f"llama.cpp's parts are not installed: {gguf.INSTALL}")

PAIRS = [{"prompt": f"Say {n}.", "chosen": f"{n} it is.", "rejected": f"No to {n}!"} for n in range(20)]


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS), encoding="utf-8")
    fixed = ("method=dpo", "dataset=local", f"dataset.path={path}", "dataset.eval_fraction=0.2", "model=tiny_random",
             "tracking=none", "trainer.max_steps=6",
             "trainer.learning_rate=1e-2", "trainer.effective_batch_size=4", "trainer.eval_steps=3",
             "trainer.save_steps=2", "samples.num_held_out=1", "samples.max_new_tokens=4")  # fmt: skip
    return lambda *more: make_settings(*fixed, *more)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_pairs_begin_as_ties_and_come_apart(settings, tmp_path, monkeypatch, forked_children):
    told = {}

    class Told(Trackers):
        def finish(self, status, metrics, reason=None):
            told.update(metrics, status=status)

    monkeypatch.setattr(sft.lifecycle, "make_trackers", lambda settings: Told())
    result = run(settings("export.formats=[merged_16bit]"), tmp_path / "run")
    assert (result.status, result.exit_code) == ("finished", 0)
    found = lines(tmp_path / "run")
    first = found[0]
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-5) and first["eval_accuracy"] == 0.5
    last = [line for line in found if "eval_loss" in line][-1]
    assert last["eval_loss"] < first["eval_loss"] and last["eval_margin"] > 0
    assert {"accuracy", "margin", "logp_chosen", "logp_rejected"} <= next(line for line in found if "loss" in line).keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["method"]["name"] == "dpo" and record["metrics"]["eval_accuracy"] == last["eval_accuracy"]
    artifacts = json.loads((tmp_path / "run" / "export" / "verify.json").read_text())["artifacts"]
    assert {name: found["status"] for name, found in artifacts.items()} == dict.fromkeys(("adapter", "merged_16bit"), "ok")
    assert told["status"] == "finished" and told["eval_loss"] == last["eval_loss"], "the tracker hears of the exports as well"
    assert told["export/merged_16bit/holds"] is True
    assert told["export/merged_16bit/loss"] == artifacts["merged_16bit"]["loss"]


@needs_gguf
def test_exports_keep_the_signs_of_the_margins_and_a_lost_adapter_does_not(settings, tmp_path, all_tokens, forked_children):
    formats = ("export.formats=[merged_16bit,gguf]", "export.gguf.quantizations=[f16,q8_0]")
    chosen, folder = settings(*formats, "dataset.eval_fraction=0.4"), tmp_path / "run"
    assert run(chosen, folder).status == "finished"
    found = json.loads((folder / "export" / "verify.json").read_text())["artifacts"]
    for name in ("adapter", "merged_16bit", "gguf/f16", "gguf/q8_0"):
        facts = found[name]
        assert facts["status"] == "ok" and facts["margins_kept"] == facts["margins"] >= 4, name
        assert facts["margins"] + facts["margins_in_noise"] == 8
        assert ("margins" in [check["name"] for check in facts["checks"]]) == (name != "gguf/q8_0")  # which is not judged
    file = folder / "adapter" / "adapter_model.safetensors"
    lost = {name: w * (0.0 if "lora_B" in name else 1.0) for name, w in load_file(file).items()}
    save_file(lost, file, metadata={"format": "pt"})
    chosen.export.formats = ["adapter"]
    report = exporter.export_run(folder, chosen)
    assert "margins" in report["artifacts"]["adapter"]["failed"]


@pytest.mark.parametrize("more", [(), ("lora=none", "trainer.learning_rate=1e-3"), ("trainer.padding_free=false",)])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(settings, tmp_path, monkeypatch, more):
    chosen = settings("trainer.logging_steps=4", *more)  # a line that takes in steps from before and after the cut
    assert run(chosen, tmp_path / "whole").status == "finished"

    def stop_at_2(self):
        self.signal = self.signal or ("SIGTERM" if (tmp_path / "cut" / "checkpoints" / "checkpoint-2").exists() else None)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", stop_at_2)
        assert run(chosen, tmp_path / "cut").status == "stopped"
    assert run(chosen, tmp_path / "cut").status == "finished"
    assert compare(tmp_path / "whole", tmp_path / "cut") == []


def test_the_margins_of_each_held_out_pair_are_kept_and_shown(settings, tmp_path):
    folder = tmp_path / "run"
    assert run(settings(), folder).status == "finished"
    first, *_, last = [json.loads(line) for line in (folder / "margins.jsonl").read_text().splitlines()]
    assert (first["step"], last["step"]) == (0, 6) and "pairs" not in last
    assert first["margins"] == pytest.approx([0] * 4, abs=1e-6)
    end = [line for line in lines(folder) if "eval_loss" in line][-1]
    assert sum(last["margins"]) / 4 == pytest.approx(end["eval_margin"], abs=1e-5)
    assert sum(last["log_ratios"]) / 4 == pytest.approx(end["eval_logp_chosen"] - end["eval_logp_rejected"], abs=1e-4)
    for margin, ratio, begun in zip(last["margins"], last["log_ratios"], first["log_ratios"], strict=True):
        assert margin == pytest.approx(0.1 * (ratio - begun), abs=1e-5)
    for pair in first["pairs"]:
        row = PAIRS[pair["row"] - 1]
        assert {name: pair[name] for name in row} == row
    assert "Margins: above 0 in" in (folder / "report.html").read_text()


def test_margins_of_an_evaluation_after_the_checkpoint_are_written_again(settings, tmp_path, monkeypatch):
    def add_and_fail(self, metrics, add=Recorder.add):
        add(self, metrics)
        if metrics["step"] == 3 and "eval_loss" in metrics:
            raise RuntimeError("cut")

    assert run(settings(), tmp_path / "whole").status == "finished"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", add_and_fail)
        assert run(settings(), tmp_path / "cut").status == "failed"
    assert '"step": 3' in (tmp_path / "cut" / "margins.jsonl").read_text()
    assert run(settings(), tmp_path / "cut").status == "finished"
    kept = [(tmp_path / name / "margins.jsonl").read_text() for name in ("whole", "cut")]
    assert kept[0] == kept[1]


def test_a_sweep_over_beta_computes_its_reference_once(settings, tmp_path, monkeypatch):
    from sft.model import warm_cache

    warm_cache.keep(True)
    try:
        before = warm_cache.loads["reference"]
        for beta in (0.05, 0.3):
            assert run(settings(f"method.beta={beta}"), tmp_path / str(beta)).status == "finished"
            warm_cache.release()
        assert warm_cache.loads["reference"] == before + 1
    finally:
        warm_cache.keep(False)


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """The pairs of each pass of the reference; its cache is empty at first, but for the models, which take seconds to make."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache_dir() / "models")
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    original, found = dpo.reference_log_probs, []

    def counted(ctx, trainer, dataset):
        found.append(len(dataset))
        return original(ctx, trainer, dataset)

    monkeypatch.setattr(dpo, "reference_log_probs", counted)
    return found


def reference_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text())["reference"]


def test_a_second_run_reads_what_the_reference_said(settings, tmp_path, passes):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, more in ((first, ()), (second, ("method.beta=0.1", "seed=3407")), (tmp_path / "r", ("lora.r=4",))):
        assert run(settings(*more), folder).status == "finished"
    assert passes == [16, 4], "the training pairs and the held-out ones, once"
    assert compare(first, second) == []
    kept = [reference_of(folder) for folder in (first, second, tmp_path / "r")]
    assert [facts["from"] for facts in kept] == ["computed", "cache", "cache"]
    assert len({facts["hash"] for facts in kept}) == 1 and {facts["weights"] for facts in kept} == {"start"}


def test_a_run_that_was_stopped_reads_it_as_well(settings, tmp_path, passes, monkeypatch):
    def stop_at_2(self):
        self.signal = self.signal or ("SIGTERM" if (tmp_path / "cut" / "checkpoints" / "checkpoint-2").exists() else None)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", stop_at_2)
        assert run(settings(), tmp_path / "cut").status == "stopped"
    assert run(settings(), tmp_path / "cut").status == "finished" and passes == [16, 4]


def local_model(folder):
    shutil.copytree(builtin.local_model(builtin.TINY_RANDOM), folder)
    return folder


def test_other_weights_types_pairs_and_layouts_have_a_reference_of_their_own(settings, tmp_path, passes):
    model = local_model(tmp_path / "model")
    short = ("trainer.max_steps=1", f"model.name={model}")
    jobs = [(), ("model.dtype=bfloat16",), ("dataset.max_rows=19",), ("trainer.padding_free=false",), ("lora.use_dora=true",)]
    for n, more in enumerate(jobs):
        assert run(settings(*short, *more), tmp_path / f"{n}").status == "finished"
        assert len(passes) == 2 * (n + 1)
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())  # the same ones, which nobody can know
    assert run(settings(*short), tmp_path / "written").status == "finished" and len(passes) == 2 * len(jobs) + 2
    assert run(settings(*short), tmp_path / "again").status == "finished" and len(passes) == 2 * len(jobs) + 2


@pytest.mark.parametrize(
    ("more", "pairs"),
    [
        ((), [10, 4]),  # a micro-batch is made ahead
        (("trainer.padding_free=false",), [10, 4]),
        (("trainer.effective_batch_size=2", "trainer.per_device_train_batch_size=2"), [6, 4]),  # accelerate makes the order
        (("trainer.max_steps=-1", "trainer.num_train_epochs=0.5"), [10, 4]),
        (("trainer.extra.data_seed=5",), [16, 4]),
        (("trainer.extra.train_sampling_strategy=sequential",), [16, 4]),
        (("trainer.max_steps=4",), [16, 4]),
    ],
)
def test_the_pairs_that_no_step_comes_to_need_no_reference(settings, tmp_path, passes, monkeypatch, more, pairs):
    chosen = settings("trainer.max_steps=2", *more)
    assert run(chosen, tmp_path / "some").status == "finished" and passes == pairs
    if pairs == [16, 4]:  # of all: the run below would be the same one
        return
    monkeypatch.setattr(dpo, "_reached", lambda trainer, settings, count, kept: list(range(count)))
    shutil.rmtree(tmp_path / "cache" / "references")
    assert run(chosen, tmp_path / "all").status == "finished" and passes[2:] == [16, 4]
    assert near(tmp_path / "some", tmp_path / "all")


def test_what_is_kept_of_the_training_pairs_has_its_reference_as_well(settings, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(measure, "ROWS", 3)
    assert run(settings("dataset.eval_fraction=0", "trainer.max_steps=2"), tmp_path / "run").status == "finished"
    rows = measure.read_rows(tmp_path / "run")
    assert len(rows) == 3 and all(len(row.reference_log_probs) == 2 for row in rows) and 10 <= passes[0] <= 13


def test_a_damaged_file_is_made_anew_and_weights_without_a_name_are_not_kept(settings, tmp_path, passes, monkeypatch):
    short = settings("trainer.max_steps=1")
    assert run(short, tmp_path / "first").status == "finished"
    (kept,) = (tmp_path / "cache" / "references").glob("*/log_probs.json")
    whole = kept.read_bytes()
    kept.write_bytes(whole.replace(b"1", b"2", 1))
    assert run(short, tmp_path / "second").status == "finished"
    assert passes == [6, 4, 6, 4] and kept.read_bytes() == whole
    monkeypatch.setattr("sft.methods.reference.weights_identity", lambda *args: None)
    for name in ("third", "fourth"):
        assert run(short, tmp_path / name).status == "finished"
        assert reference_of(tmp_path / name) == {"weights": "start", "from": "computed"}
    assert len(passes) == 8


def test_a_model_of_the_hub_is_known_by_its_commit_alone(monkeypatch):
    model = make_settings("model.name=me/mine").model
    monkeypatch.setattr(hub, "locate", lambda *args: ("me/mine", "hub me/mine"))
    assert hub.weights_identity(model, "abc") == ["me/mine", "abc"] and hub.weights_identity(model, None) is None
    model.trust_remote_code = True
    assert hub.weights_identity(model, "abc") is None


def test_pairs_that_do_not_fit_are_evaluated_in_halves_and_by_the_reference_too(
    settings, tmp_path, passes, monkeypatch, caplog
):
    chosen = settings("trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=4", "trainer.max_steps=2")
    assert run(chosen, tmp_path / "whole").status == "finished"
    shutil.rmtree(tmp_path / "cache" / "references")
    original = dpo.log_probs

    def too_large(model, batch):
        if not model.training and len(batch["target_counts"]) > 2:
            raise torch.OutOfMemoryError("planted")
        return original(model, batch)

    monkeypatch.setattr(dpo, "log_probs", too_large)
    assert run(chosen, tmp_path / "halves").status == "finished" and len(passes) == 4
    for whole, halves in zip(*(lines(tmp_path / name) for name in ("whole", "halves")), strict=True):
        keys = [key for key in whole if (key.startswith("eval_") and key != "eval_seconds") or key == "loss"]
        assert [halves[key] for key in keys] == pytest.approx([whole[key] for key in keys], abs=1e-4), keys
    assert caplog.text.count("Evaluation: ") == 2, "from 4 pairs to 2, and to 1, once and for all"


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_a_step_that_is_repeated_counts_its_pairs_once(settings, tmp_path, monkeypatch, caplog, padding_free):
    chosen = settings("trainer.per_device_train_batch_size=4", "trainer.effective_batch_size=8", "trainer.max_steps=3",
                      "trainer.logging_steps=3", "trainer.eval_steps=3", f"trainer.padding_free={padding_free}")  # fmt: skip
    assert run(chosen, tmp_path / "whole").status == "finished"
    original, passes = dpo.log_probs, []

    def too_large(model, batch):
        if model.training:
            passes.append(len(batch["target_counts"]) // 2)
            if len(passes) == 4:  # the last micro-batch of the second step
                raise torch.OutOfMemoryError("planted")
        return original(model, batch)

    monkeypatch.setattr(dpo, "log_probs", too_large)
    assert run(chosen, tmp_path / "repeated").status == "finished"
    assert passes == [4, 4, 4, 4, *[2] * 8] and "it is repeated with 2" in caplog.text
    whole, repeated = ([line for line in lines(tmp_path / n) if "loss" in line] for n in ("whole", "repeated"))
    keys = ("loss", *dpo.SHOWN)
    assert [repeated[0][key] for key in keys] == pytest.approx([whole[0][key] for key in keys], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("reference", ["start", "base"])
def test_the_reference_is_the_start_or_the_base_as_is_set(settings, tmp_path, passes, reference):
    assert run(settings(), tmp_path / "first").status == "finished"
    (kept,) = (tmp_path / "cache" / "references").glob("*/log_probs.json")
    of_base = json.loads(kept.read_text())
    shutil.rmtree(kept.parent)
    more = (f"lora.start_from={tmp_path / 'first'}", f"method.reference={reference}")
    for name in ("second", "third"):
        assert run(settings(*more), tmp_path / name).status == "finished"
    begin = lines(tmp_path / "second")[0]
    assert (begin["eval_loss"] == pytest.approx(0.693147, abs=1e-5)) == (reference == "start")
    assert (begin["eval_accuracy"] == 0.5) == (reference == "start")
    assert [reference_of(tmp_path / name)["weights"] for name in ("first", "second")] == ["start", reference]
    same = reference_of(tmp_path / "first")["hash"] == reference_of(tmp_path / "second")["hash"]
    assert same == (reference == "base"), "a fresh adapter adds nothing: the base is what the first run began with"
    (kept,) = (tmp_path / "cache" / "references").glob("*/log_probs.json")
    assert (json.loads(kept.read_text()) == of_base) == same
    assert len(passes) == 4 and reference_of(tmp_path / "third")["from"] == "cache"


def test_a_reference_that_is_another_adapter_by_now_is_refused(settings, tmp_path, monkeypatch):
    start, weights = tmp_path / "first", tmp_path / "first" / "adapter" / "adapter_model.safetensors"
    assert run(settings("trainer.max_steps=2"), start).status == "finished"
    chosen, before = settings(f"lora.start_from={start}"), weights.read_bytes()

    def stop_at_2(self):
        self.signal = self.signal or ("SIGTERM" if (tmp_path / "cut" / "checkpoints" / "checkpoint-2").exists() else None)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", stop_at_2)
        assert run(chosen, tmp_path / "cut").status == "stopped"
    save_file({name: 2 * w for name, w in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with monkeypatch.context() as patch, pytest.raises(Refusal, match="the reference of its pairs, is another by now"):
        patch.setattr("sft.model.loading.load_model", lambda *args: pytest.fail("the weights were loaded"))
        run(chosen, tmp_path / "cut")
    weights.write_bytes(before)
    assert run(chosen, tmp_path / "cut").status == "finished"


def test_the_adapter_trains_on_after_it_was_switched_off_for_the_reference(settings, tmp_path, passes):
    """The base and the start are one model for a fresh adapter: so are the runs."""
    for name in ("start", "base"):
        assert run(settings(f"method.reference={name}"), tmp_path / name).status == "finished"
        shutil.rmtree(tmp_path / "cache" / "references")
    assert len(passes) == 4
    assert weights_hash(tmp_path / "start") == weights_hash(tmp_path / "base")


def near(one, other) -> bool:
    """Whether two runs are one but for the order of sums in float32."""
    ours, theirs = lines(one), lines(other)
    assert [line.keys() - MEASURED for line in ours] == [line.keys() - MEASURED for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        keys = a.keys() - MEASURED
        assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-4, abs=1e-5)
    ours, theirs = ([json.loads(line) for line in (f / "margins.jsonl").read_text().splitlines()] for f in (one, other))
    for a, b in zip(ours, theirs, strict=True):
        assert a.get("pairs") == b.get("pairs") and a["step"] == b["step"]
        assert b["margins"] == pytest.approx(a["margins"], abs=1e-4) and len(a["margins"]) == 4
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    return max(float(abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]) < 1e-5


SPREAD = ("trainer.gradient_accumulation_steps=null", "trainer.effective_batch_size=6", "trainer.learning_rate=1e-3",
          "trainer.per_device_eval_batch_size=4")  # fmt: skip
"""16 pairs in steps of 6, so that the last step of an epoch has 4 and shares have to be filled up; 4 held-out pairs, all in one
micro-batch: one process of two has none.
"""


def test_two_processes_are_the_run_of_one_and_go_on_from_each_other(settings, tmp_path, forked_children):
    chosen = settings(*SPREAD, "trainer.per_device_train_batch_size=3", "trainer.logging_steps=3")
    two = settings(*SPREAD, "trainer.per_device_train_batch_size=3", "trainer.logging_steps=3", "distributed.num_processes=2")
    assert run(chosen, tmp_path / "one").status == "finished"
    shutil.rmtree(cache_dir() / "references", ignore_errors=True)
    assert launch(two, tmp_path / "two", Context()).status == "finished"
    assert near(tmp_path / "one", tmp_path / "two") and reference_of(tmp_path / "two")["from"] == "computed"
    for name in ("one", "two"):  # as if killed after step 4, with a step that no line has yet
        shutil.copytree(tmp_path / name, tmp_path / f"from {name}")
        shutil.rmtree(tmp_path / f"from {name}" / "checkpoints" / "checkpoint-6")
        place = tmp_path / f"from {name}" / "run.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"status": "running"}))
    assert launch(two, tmp_path / "from one", Context()).status == "finished"
    assert run(chosen, tmp_path / "from two").status == "finished"
    assert near(tmp_path / "one", tmp_path / "from one") and near(tmp_path / "one", tmp_path / "from two")


@pytest.mark.parametrize("more", [("trainer.padding_free=false", "method.loss_type=ipo"), ("method.sft_weight=0.5",)])
def test_micro_batches_of_fillers_alone_change_nothing(settings, tmp_path, forked_children, more):
    chosen = (*SPREAD, "trainer.per_device_train_batch_size=1", "trainer.max_steps=4", *more)
    assert run(settings(*chosen), tmp_path / "one").status == "finished"
    assert launch(settings(*chosen, "distributed.num_processes=2"), tmp_path / "two", Context()).status == "finished"
    assert near(tmp_path / "one", tmp_path / "two")


def test_two_processes_have_the_reference_of_all_pairs_that_their_steps_come_to(settings, tmp_path, forked_children):
    chosen = (*SPREAD, "trainer.per_device_train_batch_size=1", "trainer.max_steps=2")
    assert run(settings(*chosen), tmp_path / "one").status == "finished"
    shutil.rmtree(cache_dir() / "references", ignore_errors=True)
    assert launch(settings(*chosen, "distributed.num_processes=2"), tmp_path / "two", Context()).status == "finished"
    assert near(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("held_out", [0, 0.2])
def test_a_run_whose_chosen_answers_become_unlikely_says_so_once(settings, tmp_path, caplog, monkeypatch, held_out):
    """The rejected answer is the chosen one and more: both fall. The bar is low, for a run of 12 steps."""
    monkeypatch.setattr(dpo, "FALL", 0.03)
    monkeypatch.setattr(dpo, "LEAST_FALL", 5.0)
    pairs = [{"prompt": f"Say {n}.", "chosen": "it is so " * 4, "rejected": "it is so " * 5} for n in range(20)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    more = (f"dataset.eval_fraction={held_out}", "trainer.learning_rate=0.03", "trainer.max_steps=12", "method.beta=0.01")
    assert run(settings(*more), tmp_path / "run").status == "finished"
    told = [entry.getMessage() for entry in caplog.records if "chosen answers' log probability fell" in entry.getMessage()]
    assert len(told) == 1 and "hint: method.sft_weight=0.1" in told[0]
    step = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["chosen_fell_at"]
    prefix = "eval_" if held_out else ""
    line = next(one for one in lines(tmp_path / "run") if one["step"] == step and f"{prefix}logp_chosen" in one)
    assert line[f"{prefix}reward_chosen"] / 0.01 < -5 and line[f"{prefix}margin"] > 0


def test_a_run_whose_chosen_answers_stay_likely_says_nothing(settings, tmp_path, caplog):
    assert run(settings(), tmp_path / "run").status == "finished"
    assert "log probability fell" not in caplog.text
    assert "chosen_fell_at" not in json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]


def test_preferences_on_an_adapter_begin_as_ties_with_what_it_says(settings, tmp_path):
    """The reference is the model with the adapter that the run begins with, not the model without it."""
    first = run(settings(), tmp_path / "first")
    assert first.status == "finished"
    chosen = settings(f"lora.start_from={tmp_path / 'first'}", "trainer.learning_rate=1e-9")
    assert run(chosen, tmp_path / "second").status == "finished"
    begin, end = lines(tmp_path / "second")[0], [line for line in lines(tmp_path / "first") if "eval_loss" in line][-1]
    assert begin["eval_loss"] == pytest.approx(0.693147, abs=1e-5) and begin["eval_margin"] == pytest.approx(0, abs=1e-6)
    assert begin["eval_logp_chosen"] == pytest.approx(end["eval_logp_chosen"], rel=1e-4)
