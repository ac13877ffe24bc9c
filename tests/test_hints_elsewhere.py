"""Every hint of a refusal that is neither of a setting nor of a row: hub, disk, trackers, exports, chats, folders, scripts.

tests/config/refused.py and tests/data/test_hints.py type those.
"""

import ast
import contextlib
import functools
import io
import json
import pickle
import shlex
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts import wandb_sweep, wandb_workspace
from sft import errors
from sft.cli import export, init, leaderboard
from sft.cli import talk as chat
from sft.cli.chat import find_target
from sft.config import fingerprint
from sft.config.consent import WORD
from sft.config.schema import Settings
from sft.distributed import strategy
from sft.errors import Problem, Refusal
from sft.export import exporter
from sft.export import hub as export_hub
from sft.model import dims, files, start
from sft.model import hub as model_hub
from sft.plan.memory import ModelDims
from sft.preflight import checks
from sft.preflight.findings import Found
from sft.storage.jsonio import jsonable
from sft.sweep.index import SweepIndex
from sft.sweep.ray_cluster import RayTasks
from sft.tracking.base import check_tracking
from sft.training import acceleration
from tests import hints
from tests.conftest import ROOT, make_settings
from tests.hub_server import Repo
from tests.integration.test_hub import hub  # noqa: F401


def composed(*words: str) -> Settings:
    """The settings of these words."""
    return pickle.loads(_composed(words))


@functools.cache
def _composed(words: tuple[str, ...]) -> bytes:
    return pickle.dumps(make_settings(*words))


def found(call: Callable[[], object]) -> list[Problem]:
    """The problems that a call refuses, or gives."""
    try:
        given = call()
    except Refusal as refusal:
        return refusal.problems
    return given if isinstance(given, list) else []


def told(main: Callable[[list[str]], int], argv: list[str]) -> list[Problem]:
    """The problems that a script prints before it leaves with 2."""
    shown: list[list[Problem]] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(errors, "format_problems", lambda problems: shown.append(problems) or "refused")
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(argv)
    return shown[-1] if code == 2 else []


def typed_into_a_shell(argv: list[str], own: Callable[[list[str]], list[Problem]]) -> list[Problem]:
    """The problems of a command line of the program that is tried, or of the one that a hint names."""
    programs = {"train.py": training, "scripts/export.py": exporting, "scripts/leaderboard.py": ranking}
    if argv and argv[0] in programs:
        return programs[argv[0]](argv[1:])
    return training(argv) if argv[:1] == ["-m"] and own in (ranking, looking) else own(argv)


# ---------------------------------------------------------------------- what is tried: (command line) -> its problems


def training(argv):
    return hints.problems_of(argv, hardware=False)


def chatting(argv):
    def begin():
        options = chat.read_options(argv)
        find_target(options["run"], WORD in argv, options.get("model.name"))

    return found(begin)


def exporting(argv):
    def begin():
        folder, _, settings, push = export.read_request(argv)
        return exporter.push_run(folder, settings) if push else []

    return found(begin)


def ranking(argv):
    return told(leaderboard.main, argv)


def looking(argv):
    return told(wandb_workspace.main, argv)


def beginning(argv):
    return told(init.main, argv)


def sweeping(argv):
    return found(lambda: wandb_sweep.make_sweep(argv))


def pushing(argv):
    wanted = composed("export=adapter", *argv).export
    return export_hub.check_access(wanted.hub.repo, wanted.formats, wanted.hub.private) if wanted.hub.repo else []


def tracking(argv):
    return found(lambda: check_tracking(composed(*argv)))


def saving(argv):
    outcome = Found()
    checks.check_disk(outcome, composed("model=tiny_random", *argv), Path("outputs"), DIMS)
    return outcome.problems


def speeding(argv):
    return found(lambda: acceleration._refuse_requested(composed(*argv).trainer, "Rows are padded here"))


def going_on(argv):
    settings = composed(*argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "world_size", lambda: settings.distributed.num_processes)
        return found(lambda: strategy.check_checkpoint(Path("checkpoint-2"), settings))


def reading_files(argv):
    return files.check_model_files(Path("model"), composed(*argv).model)


def bringing_code(argv):
    model = composed(*argv).model

    def load():
        with model_hub.refusing_failures(model):
            if not model.trust_remote_code:
                raise ValueError("set `trust_remote_code=True`")

    return found(load)


def loading(argv):
    settings = composed(*argv)
    return model_hub.adapter_problem(settings.model, settings.lora)


def starting(argv):
    settings = composed("model=tiny_random", *argv)
    if not settings.lora.start_from:
        return []
    model = dims.empty_model(settings, model_hub.locate(composed("model=tiny_random").model, weights=False)[0])[0]
    return found(lambda: start.check_start(settings, model)[0])


def attaching(argv):
    """The weights of an adapter, loaded into one of rank 4 on q_proj."""
    lora = composed("model=tiny_random", *argv).lora
    return found(lambda: start.load_start(adapter_on(["q_proj"], 4), lora)) if lora.start_from else []


def on_a_cluster(argv):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        launcher = compose("config", overrides=["hydra/launcher=ray", *argv], return_hydra_config=True).hydra.launcher
    cluster = RayTasks.__new__(RayTasks)
    cluster.options = launcher.ray
    return found(cluster._check_resources)


DIMS = ModelDims(2**25, 0, 2**20, 1, 1, 1, 1, 1, 1, 1, 1, 1)

# ------------------------------------------------------------------------------------------------- where it is tried


def make_run(name: str, *words: str, status="finished", kept: str | None = "adapter", **facts) -> None:
    """A folder in outputs/ as a run leaves it, with these overrides."""
    folder, settings = Path("outputs", name), composed("model=tiny_random", *words)
    (folder / (kept or "")).mkdir(parents=True)
    if kept == "adapter":
        lora = settings.lora
        config = {"peft_type": "LORA", "base_model_name_or_path": "tiny_random", "r": lora.r, "lora_alpha": lora.lora_alpha}
        config |= {"target_modules": lora.target_modules}
        (folder / kept / "adapter_config.json").write_text(json.dumps(config))
    record = {"status": status, "settings": jsonable(settings), "config_hash": fingerprint.config_hash(settings)}
    record |= {"overrides": ["model=tiny_random", *words], **facts}
    (folder / "run.json").write_text(json.dumps(record))


def make_sweep() -> None:
    """A sweep none of whose jobs finished."""
    folder = Path("outputs/sweeps/s")
    folder.mkdir(parents=True)
    index = SweepIndex(folder.resolve(), "id", "python train.py -m lora.r=4,8", "2026-01-01T00:00:00")
    job = index.add(Settings(), {"lora.r": "4"}, ["lora.r"])
    job.status = "failed"
    index.save()


def adapter_on(targets: list[str], rank: int):
    """tiny_random, whose weights are anything, with an adapter."""
    from peft import LoraConfig, get_peft_model

    settings = composed("model=tiny_random")
    model = dims.empty_model(settings, model_hub.locate(settings.model, weights=False)[0])[0].to_empty(device="cpu")
    config = LoraConfig(r=rank, lora_alpha=settings.lora.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def make_adapter(folder: str, targets: tuple[str, ...] = ("q_proj",), **changes) -> None:
    """An adapter of tiny_random as PEFT saves it, with these changes of its config."""
    adapter_on([*targets], composed("model=tiny_random").lora.r).save_pretrained(folder)
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny_random", **changes}))


@dataclass
class World:
    """What a case may change: the environment, and the hub on loopback."""

    patch: pytest.MonkeyPatch
    hub: object = None


def raising(error: Exception) -> Callable:
    def fail(*args, **options):
        raise error

    return fail


def ray_with(**resources: float) -> types.ModuleType:
    module = types.ModuleType("ray")
    module.nodes = lambda: [{"Alive": True, "Resources": resources}]
    return module


def online(world: World, **variables: str) -> None:
    for name, value in {"WANDB_MODE": None, **variables}.items():
        world.patch.setenv(name, value) if value else world.patch.delenv(name, raising=False)


def of_processes(shared: bool) -> None:
    Path("checkpoint-2").mkdir()
    if shared:
        Path("checkpoint-2/pytorch_model_fsdp.bin").touch()


ODD = "a (b)=1"
"""A name that the shell and Hydra would take apart."""

# name: (what is tried, its command line, what is there beforehand, words of the refusal)
CASES: dict[str, tuple[Callable, list[str], Callable[[World], object], str]] = {
    "a chat: a misspelt option": (chatting, ["run=outputs/r", "promt=hi"], lambda w: make_run("r"), "A chat takes"),
    "a chat: a word that is said otherwise": (
        chatting, ["run=outputs/r", "model.trust_remote_code=yes"], lambda w: make_run("r"), "said, or left out"),
    "a chat: no number": (
        chatting, ["run=outputs/r", "max_new_tokens=many", "temperature=-1"], lambda w: make_run("r"), "number"),
    "a chat: code of a model": (
        chatting, ["run=outputs/r"], lambda w: make_run("r", "model.trust_remote_code=true"), "with your rights"),
    "a chat: nothing was trained": (
        chatting, ["run=outputs/r"], lambda w: make_run("r", status="stopped", kept=None), "Nothing was trained there"),
    "a chat: a misspelt run": (chatting, ["run=outputs/frist"], lambda w: make_run("first"), "There is no such folder"),
    "a chat: the best of a sweep without one": (chatting, ["run=outputs/sweeps/s"], lambda w: make_sweep(), "None of its jobs"),
    "an export of neither run nor checkpoint": (
        exporting, ["run=outputs/r/export/merged_16bit", "export=adapter"],
        lambda w: (make_run("r"), make_merged("outputs/r/export/merged_16bit")), "neither a run nor a checkpoint"),
    "an export of no format": (exporting, ["run=outputs/r"], lambda w: make_run("r"), "names no format"),
    "an adapter of a run without one": (
        exporting, ["run=outputs/r", "export=adapter"], lambda w: make_run("r", "lora=none", kept="model"), "the whole model"),
    "an export of what was not trained": (
        exporting, ["run=outputs/r", "export=adapter"], lambda w: make_run("r", status="stopped", kept=None), "not there"),
    "an export that runs code": (
        exporting, ["run=outputs/r", "export=adapter"], lambda w: make_run("r", "model.trust_remote_code=true"), "your rights"),
    "a push of nothing": (
        exporting, ["run=outputs/r", "push=true", "export.hub.repo=me/x"], lambda w: make_run("r"), "no exports yet"),
    "a login that cannot be used": (
        pushing, ["export.hub.repo=me/x"], lambda w: w.patch.setattr(export_hub, "_find_token", raising(OSError("gone"))),
        "login cannot be used"),
    "a hub that does not answer": (
        pushing, ["export.hub.repo=me/x"], lambda w: w.patch.setenv("HF_ENDPOINT", "http://127.0.0.1:1"), "cannot be asked"),
    "somebody else's name on the hub": (pushing, ["export.hub.repo=stranger/x"], lambda w: None, "neither your user name"),
    "an organisation that may be read": (
        pushing, ["export.hub.repo=lib/x"],
        lambda w: w.hub.user.update(orgs=[{"name": "lib", "roleInOrg": "read"}]), "only read in the organisation"),
    "a public repository for a private push": (
        pushing, ["export.hub.repo=me/x"], lambda w: w.hub.repos.update({"me/x-LoRA": Repo(private=False)}), "is public"),
    "W&B online without a login": (tracking, ["tracking.mode=online"], online, "no API key"),
    "W&B online in the environment": (tracking, [], lambda w: online(w, WANDB_MODE="online"), "no API key"),
    "W&B online without a network": (
        tracking, ["tracking.mode=online"],
        lambda w: online(w, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:1"), "takes no connection"),
    "a project that W&B refuses": (tracking, [], lambda w: online(w, WANDB_PROJECT="team/faq"), "Invalid project name"),
    "settings that W&B refuses": (tracking, [], lambda w: online(w, WANDB_BASE_URL="nothing"), "refuses its own settings"),
    "no W&B": (tracking, [], lambda w: w.patch.setitem(sys.modules, "wandb.sdk.wandb_settings", None), "wandb_settings"),
    "a disk for fewer checkpoints": (saving, [], lambda w: leave_free(w, 30), "are free there"),
    "a disk without room for exports": (saving, ["export=merged_16bit"], lambda w: leave_free(w, 60), "are free there"),
    "a disk for the least of all": (saving, ["export=merged_16bit"], lambda w: leave_free(w, 30), "are free there"),
    "padding-free where it cannot be": (speeding, ["trainer.padding_free=true"], lambda w: None, "padded here"),
    "compiled where it cannot be": (speeding, ["trainer.torch_compile=true"], lambda w: None, "padded here"),
    "captured where it cannot be": (speeding, ["trainer.cuda_graphs=true"], lambda w: None, "padded here"),
    "a checkpoint of shares, by one process": (going_on, [], lambda w: of_processes(True), "in another form"),
    "a checkpoint of shares, in a run of theirs": (
        going_on, ["distributed.strategy=fsdp"], lambda w: of_processes(True), "in another form"),
    "a checkpoint without shares": (
        going_on, ["distributed.strategy=fsdp", "distributed.num_processes=2"], lambda w: of_processes(False), "another form"),
    "an attention from a repository": (
        reading_files, ["model.name=model"],
        lambda w: make_merged("model", attn_implementation="owner/kernel"), "your rights"),
    "a model that brings code": (bringing_code, ["model.name=owner/x"], lambda w: None, "Python code of its own"),
    "an adapter on the hub as the model": (
        loading, ["model.name=owner/x"],
        lambda w: (make_run("r", "lora.r=4"), w.patch.setattr("huggingface_hub.hf_hub_download", from_run)), "is an adapter"),
    "an adapter that took its start out of the model": (
        starting, ["lora.start_from=outputs/r/checkpoints/checkpoint-2", "lora.target_modules=[q_proj]"],
        lambda w: (make_adapter("outputs/r/checkpoints/checkpoint-2", init_lora_weights="pissa"),
                   make_adapter("outputs/r/adapter")), "taken out of the model's weights"),
    "an adapter of other layers than it says": (
        starting, ["lora.start_from=a", "lora.target_modules=[v_proj]"],
        lambda w: make_adapter("a", target_modules=["v_proj"]), "of other layers"),
    "an adapter of another base": (
        starting, ["lora.start_from=a", "lora.target_modules=[q_proj]", "model.name=owner/x"],
        lambda w: make_adapter("a"), "trained on tiny_random"),
    "an adapter of another rank": (
        starting, ["lora.start_from=a", "lora.target_modules=[q_proj]", "lora.r=3"], lambda w: make_adapter("a"), "otherwise"),
    "weights of another shape": (attaching, ["lora.start_from=a"], lambda w: make_adapter("a"), "do not fit the adapter"),
    "weights of other layers": (
        attaching, ["lora.start_from=a"], lambda w: make_adapter("a", ["v_proj"]), "are not those of the adapter"),
    "a folder of a finished run": (
        training, ["model=tiny_random", "hydra.run.dir=outputs/r"], lambda w: make_run("r"), "it is finished"),
    "a folder of another run": (
        training, ["model=tiny_random", "hydra.run.dir=outputs/r", "lora.r=3"], lambda w: make_run("r", status="stopped"),
        "its settings are others"),
    "a checkpoint to resume": (
        training, ["resume=outputs/r/checkpoints"],
        lambda w: (make_run("r", status="stopped"), Path("outputs/r/checkpoints").mkdir()), "holds no run.json"),
    "a finished run to resume": (training, ["resume=outputs/r"], lambda w: make_run("r"), "This run is finished"),
    "a finished run of all weights to resume": (
        training, ["resume=outputs/r"], lambda w: (make_run("r", "lora=none", kept="model"), make_merged("outputs/r/model")),
        "This run is finished"),
    "more steps for a finished run": (
        training, ["resume=outputs/r", "trainer.max_steps=8"], lambda w: make_run("r"), "This run is finished"),
    "settings for a run that goes on": (
        training, ["resume=outputs/r", "lora.r=3"], lambda w: make_run("r", status="stopped"), "would be ignored"),
    "code of a run that goes on": (
        training, ["resume=outputs/r"], lambda w: make_run("r", WORD, status="stopped"), "your rights"),
    "a run from elsewhere that sends": (
        training, ["resume=outputs/r"],
        lambda w: make_run("r", "export=adapter", "export.hub.repo=a/b", status="stopped"), "sends what it makes"),
    "another destination for a run that goes on": (
        training, ["resume=outputs/r", "export.hub.repo=me/b"], lambda w: make_run("r", status="stopped"), "sends what it"),
    "a run of an odd name, misspelt": (
        chatting, [f"run=outputs/{ODD}s"], lambda w: make_run(ODD), "There is no such folder"),
    "an odd name: nothing was trained": (
        chatting, [f"run=outputs/{ODD}"], lambda w: make_run(ODD, status="stopped", kept=None), "Nothing was trained there"),
    "an odd name: an export of what was not trained": (
        exporting, [f"run=outputs/{ODD}", "export=adapter"], lambda w: make_run(ODD, status="stopped", kept=None), "not there"),
    "an odd name: an export of neither run nor checkpoint": (
        exporting, [f"run=outputs/{ODD}/export/merged_16bit", "export=adapter"],
        lambda w: (make_run(ODD), make_merged(f"outputs/{ODD}/export/merged_16bit")), "neither a run nor a checkpoint"),
    "an odd name: a push of nothing": (
        exporting, [f"run=outputs/{ODD}", "push=true", "export.hub.repo=me/x"], lambda w: make_run(ODD), "no exports yet"),
    "an odd name: the folder of a finished run": (
        training, ["model=tiny_random", f'hydra.run.dir="outputs/{ODD}"'], lambda w: make_run(ODD), "it is finished"),
    "an odd name: the folder of another run": (
        training, ["model=tiny_random", f'hydra.run.dir="outputs/{ODD}"', "lora.r=3"],
        lambda w: make_run(ODD, status="stopped"), "its settings are others"),
    "an odd name: a finished run to resume": (
        training, [f"resume=outputs/{ODD}"], lambda w: make_run(ODD), "This run is finished"),
    "an odd name: a finished run of all weights": (
        training, [f"resume=outputs/{ODD}"],
        lambda w: (make_run(ODD, "lora=none", kept="model"), make_merged(f"outputs/{ODD}/model")), "This run is finished"),
    "an odd name: a checkpoint to resume": (
        training, [f"resume=outputs/{ODD}/checkpoints"],
        lambda w: (make_run(ODD, status="stopped"), Path(f"outputs/{ODD}/checkpoints").mkdir()), "holds no run.json"),
    "a preset: words that cannot be used": (
        beginning, ["faq.csv", "goal=anwser", "--name=x", "force=yes", "method=dop"], lambda w: write_faq(), "There are chat"),
    "a preset: a method of another goal": (
        beginning, ["faq.csv", "goal=chat", "method=grpo"], lambda w: write_faq(), "has another method"),
    "a preset: a name of the project's": (beginning, ["faq.csv", "name=chat"], lambda w: write_faq(), "would hide it"),
    "a preset: a name that is a value": (beginning, ["faq.csv", "name=null"], lambda w: write_faq(), "A name has letters"),
    "a preset: no file": (beginning, ["lora.r=4"], lambda w: write_faq(), "names no file"),
    "a preset that is there": (
        beginning, ["faq.csv"], lambda w: (write_faq(), Path("conf/experiment").mkdir(parents=True),
                                           Path("conf/experiment/faq.yaml").touch()), "There is a file"),
    "a preset of a misspelt config": (
        beginning, ["from=confg.yaml"], lambda w: write_config(), "There is no such file"),
    "a preset of a method that is not here": (
        beginning, ["from=config.yaml"], lambda w: write_config(rl="kto"), "no such method"),
    "a table without a sweep": (ranking, [], lambda w: None, "no sweep here"),
    "a workspace without a sweep": (looking, [], lambda w: None, "no sweep here"),
    "a workspace without a login": (
        looking, ["run=outputs/r"], lambda w: make_run("r", tracking={"id": "x", "project": "p"}), "no key"),
    "a sweep of W&B's by no method": (sweeping, ["method=best", "-m", "lora.r=4,8"], lambda w: None, "no such method"),
    "a sweep of W&B's of one job": (sweeping, ["model=tiny_random"], lambda w: None, "No setting has several"),
    "a sweep of W&B's in pairs": (
        sweeping, ["-m", "lora.r=4,8", "lora.lora_alpha=4,8", "sweep.paired=[lora.r,lora.lora_alpha]"], lambda w: None,
        "every combination"),
    "a sweep of W&B's untracked": (sweeping, ["-m", "lora.r=4,8", "tracking=none"], lambda w: None, "does not hear"),
    "an interval in a grid of W&B's": (sweeping, ["sweep=tpe", "method=grid"], lambda w: None, "every value of an interval"),
    "more GPUs than a machine of a cluster has": (
        on_a_cluster, ["hydra.launcher.ray.remote.num_gpus=2"],
        lambda w: w.patch.setitem(sys.modules, "ray", ray_with(GPU=1, CPU=4)), "more than 1 GPU"),
}  # fmt: skip


def write_faq() -> None:
    Path("faq.csv").write_text("instruction,output\n" + "".join(f"question {n},answer {n}\n" for n in range(12)))


def write_config(**further) -> None:
    write_faq()
    config = {"base_model": "tiny_random", "adapter": "lora", "lora_r": 4, "datasets": [{"path": "faq.csv"}], **further}
    Path("config.yaml").write_text(json.dumps(config))


def make_merged(folder: str, **config) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **config}))


def from_run(repo: str, name: str, **options) -> str:
    """The hub's file of an adapter, which is that of the run `r`."""
    if repo != "owner/x":
        raise FileNotFoundError(name)
    return str(Path("outputs/r/adapter", name).resolve())


def leave_free(world: World, mib: int) -> None:
    usage = checks.shutil.disk_usage("/")
    world.patch.setattr(checks.shutil, "disk_usage", lambda place: usage._replace(free=mib * 2**20))


# ------------------------------------------------------------------------------------------- where a problem was made


def sites_in(path: Path) -> list[tuple[str, int, int]]:
    """(name, first line, last line) of each place that makes a problem: its function, numbered where it has several."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    calls: dict[str, list[ast.Call]] = {}

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for inner in ast.iter_child_nodes(node):
            within = (*names, inner.name) if isinstance(inner, ast.FunctionDef | ast.ClassDef) else names
            if isinstance(inner, ast.Call) and getattr(inner.func, "id", "") in ("Problem", "refuse"):
                calls.setdefault(".".join((module, *within)), []).append(inner)
            visit(inner, within)

    visit(tree, ())
    return [
        (f"{name} {number}" if len(found) > 1 else name, call.lineno, call.end_lineno)
        for name, found in calls.items()
        for number, call in enumerate(sorted(found, key=lambda call: call.lineno), 1)
    ]


@pytest.fixture(scope="module")
def sites() -> dict[Path, list[tuple[str, int, int]]]:
    """The sites of each file in `sft/` and `scripts/`."""
    return {path: found for folder in ("sft", "scripts") for path in (ROOT / folder).rglob("*.py") if (found := sites_in(path))}


@pytest.fixture
def made_at(monkeypatch, sites) -> dict[tuple[str, str], str]:
    """{(why, fix): site} of each problem that is made from now on; one that passes it on changes nothing."""
    made, build = {}, Problem.__init__

    def note(problem, *args, **options):
        build(problem, *args, **options)
        frame = sys._getframe(1)
        while frame.f_code.co_name == "refuse":
            frame = frame.f_back
        for name, first, last in sites.get(Path(frame.f_code.co_filename), ()):
            if first <= frame.f_lineno <= last:
                made.setdefault((problem.why, problem.fix), name)

    monkeypatch.setattr(Problem, "__init__", note)
    return made


ELSEWHERE = {
    "sft.config.": "tests/config/refused.py",
    "sft.cli.check.": "tests/config/refused.py",
    "sft.cli.overrides.": "tests/config/refused.py",
    "sft.data.": "tests/data/test_hints.py",
    "sft.model.chat_template.": "tests/data/test_hints.py",
    "sft.model.targets.": "tests/model/test_adapters.py",
    "sft.sweep.checks.": "tests/sweep/test_launchers.py",
    "sft.sweep.runner.Sweep._folder_of": "tests/cli/test_composition.py",
    "sft.preflight.fit.": "tests/preflight/test_checks.py",
    "sft.preflight.checks.check_data": "tests/preflight/test_checks.py",
    "sft.preflight.optimizer.": "tests/preflight/test_checks.py",
    "sft.preflight.rewards.": "tests/preflight/test_rewards.py",
    "sft.methods.rollouts.": "tests/integration/test_grpo.py",
    "sft.export.gguf.check_architecture": "tests/integration/test_families.py",
}
"""Where the hints of other modules are typed."""

UNTYPED = {
    "only the reader knows the run, the sweep, the repository or the folder that is meant": """
        sft.cli.talk.read_options 4, sft.cli.export.read_request 2, sft.cli.export.read_request 4, sft.cli.leaderboard.main 1,
        sft.cli.show.main, sft.cli.chat.find_target 1, sft.cli.target.find_run 1, sft.model.start.find_adapter 1,
        sft.runs.resume.recorded_run 1, sft.runs.resume.recorded_run 2, sft.runs.saved.settings_of, sft.runs.saved.check_base,
        sft.sweep.leaderboard.read_leaderboard, sft.sweep.leaderboard.best_run 1, sft.export.hub._check_existing 1,
        sft.export.hub._check_existing 3, sft.export.hub._check_existing 4, sft.export.hub._create,
        sft.cli.preset_file.write_preset 2, sft.cli.init.from_config, sft.cli.conversion.__init__._convert_yaml,
        sft.cli.conversion.__init__._read_yaml 2, sft.cli.conversion.notebook.convert_notebook""",
    "only the reader knows the values": """
        sft.cli.export.read_request 1, sft.cli.init.read_words 2, sft.cli.doctor.main, scripts.wandb_workspace._tracked,
        sft.sweep.grid.check_pairs 1, sft.sweep.grid.check_pairs 2, sft.sweep.slurm.SlurmJobs.start""",
    "a login, a licence or a right is given by a person, on the hub": """
        sft.export.hub.check_access 2, sft.export.hub.check_access 3, sft.export.hub._check_user 1,
        sft.model.hub._load_failed 1, sft.model.hub._load_failed 2""",
    "packages or weights are fetched from a network": """
        sft.environment.hub_unreachable, sft.model.builtin._gguf_file, sft.export.gguf.missing_parts,
        sft.cli.chat.find_target 2, scripts.wandb_workspace.define, sft.model.start.find_adapter 2, sft.tracking.swanlab.check,
        sft.tracking.swanlab._own_settings, sft.tracking.mlflow.check""",
    "room on a disk is made by a person": "sft.export.requirements.check_disk",
    "another process has to end": "sft.export.exporter.export_run, sft.runs.resume._taken, sft.sweep.runner._choose_folder",
    "files that are damaged or gone have to come back as they were": """
        sft.cli.conversion.__init__.convert, sft.cli.conversion.__init__._read_yaml 1, sft.cli.conversion.calls._cells,
        sft.export.merge.load_trained 1, sft.export.merge.load_trained 2, sft.model.files.check_model_files 1,
        sft.model.files.check_adapter_files 1, sft.model.files.check_adapter_files 2, sft.model.files._check_stop_tokens,
        sft.model.files._check_index, sft.model.files._check_weights 1, sft.model.files._check_weights 2,
        sft.model.files._check_weights 3, sft.model.files._check_weights 4, sft.model.files._check_weights 5,
        sft.model.files._check_weights 6, sft.model.start.check_start 1, sft.model.tokenizer.load_tokenizer 1,
        sft.model.tokenizer.load_tokenizer 2, sft.model.tokenizer.read_tokenizer, sft.model.tokenizer._refusing_damage,
        sft.preflight.checks.check_ids, sft.runs.saved.prompt_form, sft.sweep.index.load_index,
        sft.training.checkpoint.find_checkpoint 1, sft.training.checkpoint.find_checkpoint 2,
        sft.training.checkpoint.find_checkpoint 3""",
    "the user's own function is mended by them": """
        sft.rewards.__init__._own_reward 1, sft.rewards.__init__._own_reward 2,
        sft.rewards.__init__._own_reward 3, sft.rewards.__init__._own_reward 4, sft.rewards.__init__._own_reward 5,
        sft.cli.preview.show_rewards""",
    "it is an argument of a Python call": "sft.cli.api.run",
    "it passes on what another site made": """
        sft.errors.refuse, sft.model.files.check_model_files 2, sft.model.files.check_adapter_files 3""",
}
"""Sites whose hints nobody can type as they stand, by the reason."""

TYPED: dict[str, set[str]] = {}
"""The sites of each case of which a hint was typed."""


@pytest.fixture
def world(monkeypatch, tmp_path, request):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    return World(monkeypatch)


def exported(problem: Problem) -> list[dict[str, str]]:
    """The variables that a hint has the shell export."""
    parts = [part.strip() for line in problem.fix.splitlines() for part in line.split("   or   ")]
    lines = [part.partition("   ")[0] for part in parts if part.startswith("export ") and not hints.PLACEHOLDER.search(part)]
    return [dict(word.split("=", 1) for word in shlex.split(line)[1:]) for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_every_hint_gets_the_command_further(world, made_at, request, case):
    tried, argv, prepare, words = CASES[case]
    if tried is pushing:
        world.hub = request.getfixturevalue("hub")
    prepare(world)
    problems = tried(argv)
    assert any(words in problem.why for problem in problems), problems

    def check(command: list[str]) -> list[Problem]:
        left = typed_into_a_shell(command, tried)
        same = {site_of(problem) for problem in left} & {site_of(problem) for problem in problems}
        assert not same or len(problems) > 1, f"{command} is refused as before: {left}"
        return left

    def site_of(problem: Problem) -> str:
        return made_at.get((problem.why, problem.fix), "")

    hints.type_hints(argv, problems, check)
    for problem in problems:
        for variables in exported(problem):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                assert problem not in check(argv)
    TYPED[case] = {site_of(problem) for problem in problems if hints.hints_of(problem)}
    assert TYPED[case], f"nothing of the hints can be typed: {problems}"


def test_every_other_hint_is_known_to_be_advice(sites):
    if TYPED.keys() != CASES.keys():
        pytest.skip("only where every hint was typed before")
    names = {name for found in sites.values() for name, _, _ in found if not name.startswith(tuple(ELSEWHERE))}
    typed, advice = set().union(*TYPED.values()), {name.strip() for found in UNTYPED.values() for name in found.split(",")}
    assert names - typed - advice == set(), "type their hints, or say why nobody can"
    assert advice - (names - typed) == set(), "they are typed, or gone"
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())
