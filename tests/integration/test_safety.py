"""What a run leaves behind holds no secret, whatever it was told; a checkpoint that was tampered with runs no code, and
neither does a run folder that came from elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sft.config.compose import to_settings
from sft.config.fingerprint import config_hash
from sft.config.schema import Settings
from sft.lifecycle import run
from sft.model import builtin
from sft.report import page
from sft.storage import atomic
from sft.storage.cache import cache_dir
from tests import forked
from tests.conftest import ROOT, SMALL, in_one_process, make_settings
from tests.test_safety import add_code, change, write_pickle

# -------------------------------------------------------------------------------------------------------------- secrets

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDinTheEnvironment1",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef0badcafe",
    "OPENAI_API_KEY": "sk-planted-elsewhere-in-the-environment",
    "netrc": "plantedInNetrc0123456789",
    "login": "hf_PLANTEDinTheLoginFile22",
    "endpoint": "plantedInTheEndpoint",
    "proxy": "plantedInTheProxy",
    "override": "hf_PLANTEDonTheCommandLine3",
}


@pytest.fixture
def machine(tmp_path):
    """The environment of a machine with secrets in every place, all of whose files are in `tmp_path`."""
    home, kept = tmp_path / "home", tmp_path / "planted"
    for place in (home, kept, tmp_path / "tmp", tmp_path / "cache"):
        place.mkdir()
    page.bundled_charts()
    for made in (builtin.local_model("tiny_random").parent, cache_dir() / "charts"):  # once
        (tmp_path / "cache" / made.name).symlink_to(made)
    hosts = ("api.wandb.ai", "huggingface.co", "127.0.0.1")
    (kept / "netrc").write_text("".join(f"machine {h} login user password {PLANTED['netrc']}\n" for h in hosts))
    (kept / "token").write_text(PLANTED["login"])
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"instruction": "q {i}", "output": "a {i}"}}\n' for i in range(24)))
    proxy = f"http://me:{PLANTED['proxy']}@127.0.0.1:9"
    return {
        **{name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")},
        **{name: value for name, value in PLANTED.items() if name.isupper()},
        "HOME": str(home), "SFT_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"), "HF_HOME": str(home / "hf"),
        "NETRC": str(kept / "netrc"), "HF_TOKEN_PATH": str(kept / "token"), "WANDB_MODE": "offline",
        "HF_ENDPOINT": f"http://me:{PLANTED['endpoint']}@127.0.0.1:9", "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy,
    }  # fmt: skip


def train(cwd: Path, environment: dict, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=280)


def find_planted(place: Path, *printed: str) -> list[str]:
    """Where a planted value stands: in which file below `place`, or in what was printed."""
    values = {name: value.encode() for name, value in PLANTED.items()}
    files = [p for p in place.rglob("*") if p.is_file() and "planted" not in p.relative_to(place).parts]
    assert files
    contents = [(str(p), p.read_bytes()) for p in files] + [("printed", text.encode()) for text in printed]
    return [f"{name} in {where}" for where, content in contents for name, value in values.items() if value in content]


@pytest.mark.slow
def test_no_secret_of_the_machine_reaches_anything_that_a_run_writes_or_prints(tmp_path, machine):
    """The rows are the user's own: what stands in them is shown, as anything else in them."""
    job = (*SMALL, "trainer=debug", "tracking=wandb", "export=adapter", "dataset=local", "dataset.path=rows.jsonl")
    done = train(tmp_path, machine, *job, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr[-3000:]
    for made in ("run/train.log", "run/report.html", "run/export/adapter/README.md", "cache/tokens"):
        assert (tmp_path / made).exists(), made
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert find_planted(tmp_path, done.stdout, done.stderr) == []
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert PLANTED["HF_TOKEN"].encode() not in content and PLANTED["WANDB_API_KEY"].encode() not in content, file
    (tmp_path / "run" / "leak.txt").write_text(PLANTED["proxy"])
    assert find_planted(tmp_path) == [f"proxy in {tmp_path / 'run' / 'leak.txt'}"], "what is looked for would be found"


def test_no_secret_is_in_a_refusal_or_in_what_it_leaves(tmp_path, machine):
    machine = {name: value for name, value in machine.items() if not name.endswith("_PROXY")}
    word = PLANTED["override"]
    commands = (
        ("model.name=some-owner/some-model",),
        ("dataset.name=some-owner/some-data",),
        (f"tracking.name={word}", f"model.name={word}", f"+trainer.extra.hub_token={word}"),
        ("-m", f"lora.r=8,{word}", f"-model.name={word}"),
    )
    words = in_one_process([[*SMALL, *words] for words in commands])
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=machine, timeout=280)
    assert done.stdout.count("code 2\n") == len(commands) == done.stderr.count("Refused"), done.stderr[-3000:]
    assert find_planted(tmp_path, done.stdout, done.stderr) == []


# --------------------------------------------------------------------------------------------------------- checkpoints


def job(*overrides: str) -> Settings:
    return make_settings(*SMALL, "trainer.max_steps=3", "trainer.eval_steps=1", "trainer.save_steps=1", *overrides)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that its time limit stopped after a step, with a checkpoint to go on from."""
    folder = tmp_path_factory.mktemp("safety") / "run"
    assert run(job("trainer.max_hours=0.000001"), folder).status == "stopped"
    assert list((folder / "checkpoints").glob("checkpoint-*"))
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"])
def test_a_checkpoint_with_a_hostile_pickle_runs_no_code(tmp_path, stopped, name):
    folder, marker = tmp_path / "run", tmp_path / "code_was_run"
    shutil.copytree(stopped, folder)
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    write_pickle(checkpoint / name, marker)
    atomic.write_manifest(checkpoint)
    result = run(job(), folder)
    assert result.status == "failed" and not marker.exists()
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "Weights only load failed" in log


def test_a_checkpoint_as_it_was_goes_on(tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    assert run(job(), tmp_path / "run").status == "finished", "else the tests above would prove nothing"


# ----------------------------------------------------------------------------------------------------- a stranger's folder

WORD = "model.trust_remote_code=true"


@pytest.fixture
def strange(tmp_path, stopped):
    """A run folder whose run.json allows code, with code in its model and its tokenizer; and what that code makes."""
    folder, model, marker = tmp_path / "run", tmp_path / "model", tmp_path / "code_was_run"
    shutil.copytree(stopped, folder)
    shutil.copytree(builtin.local_model("tiny_random"), model)
    add_code(model, marker, "config")
    add_code(folder / "adapter", marker, "tokenizer")
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    settings["model"] |= {"name": str(model), "trust_remote_code": True}
    change(folder / "run.json", settings=settings, config_hash=config_hash(to_settings(OmegaConf.create(settings))))
    return folder, marker


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("train.py", ["resume={run}"]),
        ("scripts/preview.py", ["resume={run}"]),
        ("scripts/chat.py", ["run={run}", "prompt=hello"]),
        ("scripts/chat.py", ["run={run}", "against=base", "prompt=hello"]),
        ("scripts/export.py", ["run={run}", "export=merged_16bit"]),
        ("sft/export/__main__.py", ["{run}"]),
    ],
    ids=["resume", "preview", "chat", "base", "export", "module"],
)
def test_a_run_folder_from_elsewhere_runs_no_code_unless_this_command_says_so(tmp_path, strange, program, words):
    folder, marker = strange
    own_cache = tmp_path / "own_cache.py"  # the variable is read where transformers is imported
    own_cache.write_text(
        f"import transformers\ntransformers.dynamic_module_utils.HF_MODULES_CACHE = {str(tmp_path / 'modules')!r}\n"
    )
    words = [word.replace("{run}", str(folder)) for word in words]
    refused = forked.run(program, *words, cwd=tmp_path, before=own_cache)
    assert refused.returncode == 2 and WORD in refused.stderr and "Traceback" not in refused.stderr, refused.stderr[-3000:]
    assert not marker.exists()
    words.insert(0 if program == "sft/export/__main__.py" else len(words), WORD)
    forked.run(program, *words, cwd=tmp_path, before=own_cache)
    assert marker.exists(), "else this test would prove nothing"
