"""sft doctor: each row with its fault planted, and with the command that mends it."""

import json
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sft import environment
from sft.cli import doctor
from sft.cli.doctor import MISSING, OK, OPTIONAL
from sft.cli.main import main
from sft.programs import VARIABLE, as_called

KEY = "f" * 40


@pytest.fixture(autouse=True)
def healthy(tmp_path, monkeypatch):
    """A folder of one's own, logged in everywhere, with a hub that answers and a GPU that torch was built for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_" + KEY)
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "hub_reachable", lambda timeout: True)
    monkeypatch.setattr(doctor, "_driver", lambda: (["NVIDIA H100"], "580.65", (13, 0)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sft.export.gguf.missing_parts", list)
    real = metadata.version
    tested = {"unsloth": "2026.10.9"}
    monkeypatch.setattr(metadata, "version", lambda name: tested.get(name) or real(name))


def row(part: str) -> doctor.Row:
    [found] = [row for row in doctor.examine() if row.part == part]
    return found


def other_versions(monkeypatch, **versions: str | None) -> None:
    """Have these packages be of other versions, or not installed."""
    before = metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return before(name)
        if versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_a_machine_with_everything_is_ok(capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["part", "state", "found", "mend", "with"]
    assert {row.state for row in doctor.examine()} == {OK}
    for name in (
        "Python",
        "torch",
        "transformers",
        "trl",
        "peft",
        "unsloth",
        "wandb",
        "GPU",
        "W&B login",
        "hub token",
        "llama.cpp",
    ):
        assert row(name).state == OK and not row(name).fix


def test_an_untested_python_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    found = row("Python")
    assert (found.state, found.found) == (MISSING, "3.9.1; tested: 3.11 to 3.13") and found.fix.startswith("uv venv --python")
    assert doctor.main([]) == 1


@pytest.mark.parametrize("name", ["torch", "transformers", "trl", "peft", "wandb", "filelock"])
def test_a_package_that_is_not_installed_is_missing(name, monkeypatch):
    other_versions(monkeypatch, **{name: None})
    assert (row(name).state, row(name).fix) == (MISSING, "pip install -e .") and doctor.main([]) == 1


def test_another_version_is_told_and_keeps_no_run_from_starting(monkeypatch):
    other_versions(monkeypatch, trl="0.9.1", torch="2.13.0+cu130")
    assert (row("trl").state, row("trl").fix) == (OPTIONAL, "pip install -e .") and row("trl").found.startswith(
        "0.9.1; tested: =="
    )
    assert row("torch").state == OK and doctor.main([]) == 0


def test_unsloth_is_optional(monkeypatch):
    other_versions(monkeypatch, unsloth=None)
    assert (row("unsloth").state, row("unsloth").fix) == (OPTIONAL, 'pip install -e ".[unsloth]"') and doctor.main([]) == 0


def test_a_package_that_cannot_be_imported_ends_no_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "sft.tracking.wandb", None)
    monkeypatch.delattr("sft.tracking.wandb", raising=False)
    assert row("W&B login").state == MISSING and "cannot be looked at" in row("W&B login").found


@pytest.mark.parametrize(
    "driver, built, available, state, words, fix",
    [
        (([], "", (0, 0)), "13.0", False, OPTIONAL, "no NVIDIA driver", "nvidia-smi"),
        ((["T4"], "535.1", (12, 2)), "13.0", False, MISSING, "the driver is older", "   or a newer driver"),
        ((["T4"], "535.1", (12, 2)), None, False, MISSING, "torch for CUDA none", "--torch-backend=auto"),
        ((["H100"], "580.1", (13, 0)), None, False, MISSING, "torch for CUDA none", "--torch-backend=auto"),
        ((["H100"], "580.1", (13, 0)), "13.0", False, MISSING, "torch cannot use it", "nvidia-smi"),
        ((["H100"], "580.1", (13, 2)), "12.6", True, OK, "H100, driver 580.1 (CUDA 13.2), torch for CUDA 12.6", ""),
    ],
)
def test_the_driver_is_compared_with_what_torch_was_built_for(driver, built, available, state, words, fix, monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = row("GPU")
    assert found.state == state and words in found.found and (fix in found.fix if fix else not found.fix)


def test_a_command_for_uv_stays_as_it_is_where_pip_is_spelled_out(monkeypatch):
    monkeypatch.setattr("sft.programs.INSTALLED", True)
    monkeypatch.setattr("sft.programs._typed_installer", lambda: "/own/python -m pip install")
    assert as_called("uv pip install torch   (pip install uv)") == "uv pip install torch   (/own/python -m pip install uv)"


def test_a_gpu_that_is_hidden_is_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (row("GPU").state, row("GPU").fix) == (OPTIONAL, "unset CUDA_VISIBLE_DEVICES")


def test_the_driver_is_read_from_nvml(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetCount, nvml.nvmlDeviceGetHandleByIndex = lambda: 2, lambda i: i
    nvml.nvmlDeviceGetName, nvml.nvmlSystemGetDriverVersion = lambda i: f"GPU {i}".encode(), lambda: "550.2"
    nvml.nvmlSystemGetCudaDriverVersion = lambda: 12040
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert doctor._driver() == (["GPU 0", "GPU 1"], "550.2", (12, 4))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor._driver() == ([], "", (0, 0))


def test_without_logins_rows_name_the_commands_and_no_run_is_kept_from_starting(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert (row("W&B login").state, row("W&B login").fix) == (OPTIONAL, "wandb login   or   tracking=none")
    assert (row("hub token").state, row("hub token").fix) == (OPTIONAL, "hf auth login") and doctor.main([]) == 0


def test_a_login_saved_by_wandb_counts(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n", encoding="utf-8")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert row("W&B login").state == OK and row("W&B login").found.startswith("the saved login")


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["table", "json"])
def test_no_key_is_shown(words, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{KEY}@mirror.example")
    doctor.main(words)
    seen = capsys.readouterr()
    assert KEY not in seen.out + seen.err and "mirror.example" in seen.out


def test_a_hub_that_does_not_answer_names_the_mirror(monkeypatch):
    waited = []
    monkeypatch.setattr(environment, "hub_reachable", lambda timeout: waited.append(timeout))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert (
        row("hub").state == OPTIONAL
        and row("hub").fix.startswith("export HF_ENDPOINT=https://hf-mirror.com")
        and set(waited) == {3.0}
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (row("hub").found, row("hub").fix) == ("switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    "part, fix",
    [
        ("disk of outputs", "hydra.run.dir=<a folder on another disk>"),
        ("disk of the cache", "export SFT_CACHE=<a folder on another disk>"),
        ("disk of the hub", "export HF_HOME=<a folder on another disk>"),
    ],
)
def test_a_full_disk_is_missing(part, fix, monkeypatch):
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=2**30))
    assert (row(part).state, row(part).found, row(part).fix) == (MISSING, "1.0 GiB free", fix) and doctor.main([]) == 1


def test_a_folder_that_takes_no_file_is_missing(monkeypatch):
    monkeypatch.setattr(
        "sft.cli.check.tempfile.TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError(13, "denied"))
    )
    assert row("disk of outputs").state == MISSING and "Nothing can be written" in row("disk of outputs").found


def test_no_home_folder_is_missing(monkeypatch):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert [one.state for one in doctor.examine() if one.found.startswith("there is no home folder")] == [MISSING]


def test_parts_of_llama_cpp_that_are_missing_are_optional(monkeypatch):
    from sft.export import gguf

    monkeypatch.undo()
    monkeypatch.setattr(gguf, "CONVERTER", Path("/nowhere"))
    assert (row("llama.cpp").state, row("llama.cpp").fix) == (OPTIONAL, "python scripts/install_gguf.py")


def test_the_rows_are_one_json_object(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True and {"part", "state", "found", "fix"} == found["rows"][0].keys()


def test_commands_are_those_of_the_installed_program(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr("sft.programs.INSTALLED", True)
    other_versions(monkeypatch, trl=None)
    assert main(["doctor"]) == 1 and ' install "sft-lora"' in capsys.readouterr().out
    assert main(["doctor", "--help"]) == 0 and "sft doctor --json" in capsys.readouterr().out
    assert main(["doctor", "torch"]) == 2 and "hint: leave torch out" in capsys.readouterr().err
