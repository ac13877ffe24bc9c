"""An adapter is trained further: on other data or settings, in a new run."""

import json
import os
import shutil

import pytest

from sft.cli.check import check_command_line
from sft.config.fingerprint import config_hash
from sft.config.rules import check_settings
from sft.errors import Refusal
from sft.export import gguf, measure
from sft.export.exporter import export_run
from sft.lifecycle import run
from sft.model import loading
from sft.plan.plan import Plan
from sft.runs.resume import recorded_run
from sft.storage.jsonio import read_json, read_lines
from tests import forked
from tests.conftest import ROOT, SMALL, make_settings

QUICK = ("trainer=debug", "trainer.max_steps=3", "trainer.warmup_steps=0", "trainer.learning_rate=0.01", "lora.r=4",
         "lora.lora_alpha=8", "lora.target_modules=[q_proj,up_proj]", "trainer.load_best_model_at_end=false")  # fmt: skip


def train(folder, *overrides):
    result = run(make_settings(*SMALL, *QUICK, *overrides), folder)
    assert (result.status, result.exit_code) == ("finished", 0), read_json(folder / "run.json").get("reason")
    return folder


pytestmark = pytest.mark.usefixtures("all_tokens")
CONVERTED = [] if gguf.missing_parts() else ["gguf"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, all_tokens):
    """Three runs, each of which trains the one before further."""
    place = tmp_path_factory.mktemp("chain")
    first = train(place / "first")
    second = train(place / "second", f"lora.start_from={first}")
    formats = (f"export.formats=[{','.join(['merged_16bit', *CONVERTED])}]", "export.gguf.quantizations=[q8_0]",
               f"export.gguf.adapter={str(bool(CONVERTED)).lower()}")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subprocess.Popen", forked.popen)
        third = train(place / "third", f"lora.start_from={second}/adapter", "seed=7", "dataset.seed=3407", *formats)
    return first, second, third


def losses(folder):
    found = [line["eval_loss"] for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    return found[0], found[-1]


def test_the_first_held_out_loss_is_the_last_one_of_the_run_before(chain):
    first, second, third = chain
    assert losses(second)[0] == pytest.approx(losses(first)[1], abs=1e-5)
    assert losses(third)[0] == pytest.approx(losses(second)[1], abs=1e-5)
    assert losses(third)[1] < losses(second)[1] < losses(first)[1] < losses(first)[0]


def test_the_last_of_three_is_exported_and_proven(chain):
    found = read_json(chain[2] / "export/verify.json")
    statuses = {name: facts["status"] for name, facts in found["artifacts"].items()}
    names = ["adapter", "merged_16bit", *(["gguf/q8_0", "gguf/adapter"] if CONVERTED else [])]
    assert statuses == dict.fromkeys(names, "ok")
    assert found["reference"]["base_loss"] == pytest.approx(losses(chain[0])[0], abs=1e-3), "the model under all three"


def test_preferences_after_two_supervised_runs_begin_as_ties_and_are_exported_and_proven(chain, tmp_path, forked_children):
    formats = (f"export.formats=[{','.join(['merged_16bit', *CONVERTED])}]", "export.gguf.quantizations=[q8_0]")
    folder = train(tmp_path / "pairs", "method=dpo", f"lora.start_from={chain[1]}", "trainer.learning_rate=1e-3", *formats)
    assert losses(folder)[0] == pytest.approx(0.693147, abs=1e-5) and losses(folder)[1] < losses(folder)[0]
    found = read_json(folder / "export/verify.json")["artifacts"]
    names = ["adapter", "merged_16bit", *(["gguf/q8_0"] if CONVERTED else [])]
    assert {name: facts["status"] for name, facts in found.items()} == dict.fromkeys(names, "ok")


def test_the_record_and_the_model_card_say_where_a_run_started_from(chain):
    first, second, third = chain
    assert read_json(second / "run.json")["start_from"] == {"adapter": str(first / "adapter"), "base": "tiny_random"}
    assert "start_from" not in read_json(first / "run.json")
    card = (third / "export/merged_16bit/README.md").read_text(encoding="utf-8")
    assert "| trained further from | the adapter `second` |" in card and str(second) not in card


def test_a_run_that_starts_from_an_adapter_is_another_run_than_one_that_does_not(chain):
    plain = config_hash(make_settings(*SMALL, *QUICK))
    assert read_json(chain[0] / "run.json")["config_hash"] == plain != read_json(chain[1] / "run.json")["config_hash"]


def test_a_chain_that_was_cut_goes_on_from_its_checkpoint(chain, tmp_path, cut_at_first_save):
    import torch
    from safetensors.torch import load_file

    overrides = (f"lora.start_from={chain[0]}", "trainer.save_steps=1")
    assert cut_at_first_save(make_settings(*SMALL, *QUICK, *overrides), tmp_path / "cut").status == "failed"
    cut = train(tmp_path / "cut", *overrides)
    one, other = (load_file(f / "adapter/adapter_model.safetensors") for f in (chain[1], cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "why", "fix"),
    [
        ("lora.r=8", "lora.r is 4 there and 8 here", "lora.r=4"),
        ("lora.lora_alpha=4", "lora.lora_alpha is 8 there and 4 here", "lora.lora_alpha=8"),
        ("lora.target_modules=[q_proj]", "lora.target_modules is [q_proj,up_proj] there and [q_proj] here",
         "lora.target_modules=[q_proj,up_proj]"),
        ("lora.use_dora=true", "lora.use_dora is false there and true here", "lora.use_dora=false"),
        ("lora.modules_to_save=[norm]", "lora.modules_to_save is [] there and [norm] here", "lora.modules_to_save=[]"),
        ("lora.extra.rank_pattern={q_proj:2}", "lora.extra.rank_pattern is not set there and {q_proj:2} here",
         "lora.extra.rank_pattern=null"),
        ("lora.extra.layers_to_transform=[0]", "lora.extra.layers_to_transform is not set there and [0] here",
         "lora.extra.layers_to_transform=null"),
    ],
)  # fmt: skip
def test_an_adapter_that_was_made_otherwise_is_refused_before_loading(chain, tmp_path, monkeypatch, change, why, fix):
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    start = f"lora.start_from={chain[0]}"
    with pytest.raises(Refusal) as refused:
        run(make_settings(*SMALL, *QUICK, start, change), tmp_path / "run")
    [problem] = refused.value.problems
    assert why in problem.why and problem.fix == fix
    monkeypatch.undo()
    from sft.model import start as starting
    from sft.model.dims import empty_model
    from sft.model.hub import locate

    settings = make_settings(*SMALL, *QUICK, start, change, *fix.replace("'", "").split())
    model = empty_model(settings, locate(settings.model, weights=False)[0])[0]
    assert starting.check_start(settings, model)[0] == []


def test_the_same_layers_in_other_words_are_the_same(chain, tmp_path):
    train(tmp_path / "run", f"lora.start_from={chain[0]}", 'lora.target_modules=[".*(q|up)_proj"]', "trainer.max_steps=1")


def test_another_base_is_refused_with_the_right_one_and_a_copy_of_it_is_taken_with_a_word(chain, tmp_path):
    from sft.model import start as starting
    from sft.model.dims import empty_model
    from sft.model.hub import locate

    def check(name):
        settings = make_settings(*SMALL, *QUICK, f"lora.start_from={chain[0]}", f"model.name={name}")
        model = empty_model(make_settings(*SMALL), locate(make_settings(*SMALL).model, weights=False)[0])[0]
        return starting.check_start(settings, model)

    [problem], _, _ = check("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "was trained on tiny_random" in problem.why and problem.fix == "model.name=tiny_random"
    shutil.copytree(locate(make_settings(*SMALL).model)[0], tmp_path / "tiny_random")
    problems, warnings, _ = check(tmp_path / "tiny_random")
    assert problems == [] and "taken to be the same" in warnings[0]
    problems, warnings, _ = check(locate(make_settings(*SMALL).model)[0])
    assert (problems, warnings) == ([], []), "the very folder"


def test_a_checkpoint_is_an_adapter_too_and_a_folder_without_one_is_told(chain, tmp_path, monkeypatch):
    def problems(value):
        return check_settings(make_settings(*SMALL, *QUICK, f"lora.start_from={value}"), hardware=False)

    steps = sorted((chain[0] / "checkpoints").iterdir())
    assert problems(steps[-1]) == [] and problems(chain[0]) == [] and problems("owner/name") == []
    assert "There is no such folder" in problems(tmp_path / "nothing")[0].why
    assert problems(chain[0].parent)[0].fix == f"lora.start_from={chain[2]}"
    (tmp_path / "whole/model").mkdir(parents=True)
    (tmp_path / "whole/model/config.json").write_text("{}")
    assert problems(tmp_path / "whole")[0].fix == f"lora.start_from=null model.name={tmp_path}/whole/model"
    settings = make_settings(*SMALL, f"lora.start_from={chain[0]}", "lora.extra.init_lora_weights=pissa")
    assert "would be ignored" in check_settings(settings, hardware=False)[0].why


def test_weights_that_do_not_fit_the_config_are_refused(chain, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(chain[0] / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if ".layers.1." not in name}, file)
    with pytest.raises(Refusal, match="Its weights are of other layers"):
        run(make_settings(*SMALL, *QUICK, f"lora.start_from={tmp_path}/adapter"), tmp_path / "run")


# ------------------------------------------------------------------------------------------ commands that lead there


def test_an_adapter_as_the_model_names_the_command_that_trains_it_further(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (chain[0], chain[0] / "adapter"):
        [problem] = check_settings(make_settings(*SMALL, f"model.name={name}"), hardware=False)
        assert "lora.start_from trains it further" in problem.why
        words = [word.strip("'") for word in problem.fix.split()]
        assert words[:2] == ["model.name=tiny_random", f"lora.start_from={chain[0]}/adapter"]
        settings = make_settings(*SMALL, *QUICK[:2], *words)
        assert check_settings(settings, hardware=False) == []
    assert run(settings, tmp_path / "run").status == "finished"


def test_an_adapter_on_the_hub_is_refused_as_a_model_and_taken_as_a_start(chain, tmp_path, monkeypatch):
    """transformers would load its base with the adapter inside, under the one that is trained."""
    import huggingface_hub

    def download(repo, name, **options):
        file = chain[0] / "adapter" / name
        if repo != "owner/name" or not file.is_file():
            raise FileNotFoundError(name)
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(Refusal) as refused:
        loading.load_model(make_settings(*SMALL, "model.name=owner/name"), Plan())
    words = [word.strip("'") for word in refused.value.problems[0].fix.split()]
    assert words[:2] == ["model.name=tiny_random", "lora.start_from=owner/name"]
    result = run(make_settings(*SMALL, *QUICK[:4], "trainer.load_best_model_at_end=false", *words), tmp_path / "run")
    assert result.status == "finished" and losses(result.folder)[0] == pytest.approx(losses(chain[0])[1], abs=1e-5)
    assert read_json(result.folder / "run.json")["start_from"]["adapter"] == "owner/name"
    with pytest.raises(Refusal, match="the hub's adapter cannot be had"):
        run(make_settings(*SMALL, *QUICK, "lora.start_from=owner/other"), tmp_path / "other")


def test_more_steps_for_a_finished_run_name_the_new_run_that_goes_on(chain, tmp_path, monkeypatch):
    record = json.loads((chain[0] / "run.json").read_text(encoding="utf-8"))
    shutil.copytree(chain[0], tmp_path / "run")
    record["overrides"] = [*SMALL, *QUICK, "hydra.run.dir=elsewhere"]
    (tmp_path / "run/run.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal) as refused:
        check_command_line(ROOT / "conf", ["resume=run", "trainer.max_steps=8"])
    [problem] = refused.value.problems
    assert problem.why == "This run is finished."
    words = problem.fix.partition("   ")[0].replace("'", "").split()
    assert words[:2] == ["python", "train.py"] and {"trainer.max_steps=8", "lora.start_from=run"} < set(words)
    assert not any(word.startswith(("hydra.", "trainer.max_steps=3")) for word in words)
    check_command_line(ROOT / "conf", words[2:])
    with pytest.raises(Refusal, match=r"lora\.start_from=run   trains its weights further, in a new run"):
        recorded_run(tmp_path / "run")


def test_a_pissa_run_is_trained_further_with_the_rank_it_was_saved_with(tmp_path, monkeypatch):
    words = [*SMALL, *QUICK, "lora.extra.init_lora_weights=pissa"]
    first = train(tmp_path / "first", "lora.extra.init_lora_weights=pissa")
    record = json.loads((first / "run.json").read_text(encoding="utf-8"))
    (first / "run.json").write_text(json.dumps({**record, "overrides": words}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal) as refused:
        recorded_run(first)
    found = [w.strip("'") for w in refused.value.problems[0].fix.partition("   ")[0].split()[2:]]
    with pytest.raises(Refusal, match="not put back") as refused:
        step = max((first / "checkpoints").iterdir())
        run(make_settings(*(w for w in found if "start_from" not in w), f"lora.start_from={step}"), tmp_path / "step")
    assert refused.value.problems[0].fix == f"lora.start_from={first}/adapter"
    second = run(make_settings(*found), tmp_path / "second")
    assert second.status == "finished" and losses(second.folder)[0] == pytest.approx(losses(first)[1], abs=1e-4)


def test_an_export_needs_the_earlier_adapter_no_more(chain, tmp_path):
    shutil.copytree(chain[1], tmp_path / "run")
    record = (tmp_path / "run/run.json").read_text(encoding="utf-8").replace(str(chain[0]), str(tmp_path / "gone"))
    (tmp_path / "run/run.json").write_text(record, encoding="utf-8")
    assert not os.path.exists(tmp_path / "gone")
    settings = make_settings(*SMALL, *QUICK, f"lora.start_from={tmp_path}/gone", "export=merged_16bit")
    report = export_run(tmp_path / "run", settings)
    assert {f["status"] for f in report["artifacts"].values()} == {"ok"} and measure.read_rows(tmp_path / "run")
