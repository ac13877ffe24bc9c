"""The installed command: the words of train.py and the scripts, presets of one's own, completion, and a wheel that is whole."""

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import transcript
from sft.cli import check
from sft.cli.check import check_command_line, read_settings
from sft.cli.main import WORDS, likeliest, main, training_words
from sft.config.compose import command_text
from sft.errors import Problem, Refusal
from sft.paths import CONF
from sft.programs import VARIABLE, as_called
from tests.conftest import ROOT

PROGRAM = f"#!{sys.executable}\nimport sys\nfrom sft.cli.main import main\nsys.exit(main())\n"
EXPERIMENT = "# @package _global_\nlora: {r: 4}\n"


@pytest.fixture
def typed(monkeypatch):
    """As where `sft` was typed."""
    monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """An empty folder but for a preset in its conf/, as the working folder."""
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/x.yaml").write_text(EXPERIMENT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_program(folder: Path) -> dict[str, str]:
    """`sft` in a folder; returns the environment that finds it."""
    folder.mkdir()
    (folder / "sft").write_text(PROGRAM, encoding="utf-8")
    (folder / "sft").chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("words", [[], ["--help"], ["trian"]], ids=["alone", "help", "unknown"])
def test_the_overview_and_a_refusal_load_neither_hydra_nor_torch(words):
    heavy = {"hydra", "omegaconf", "torch", "transformers", "numpy", "yaml"}
    code = f"import sys; from sft.cli.main import main; code = main({words!r}); assert not {heavy!r} & set(sys.modules); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit(code)"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if words == ["trian"]:
        assert done.returncode == 2 and done.stderr == "There is no sft trian.\nhint: sft train\n"
    else:
        assert done.returncode == 0 and all(f"\n  sft {word} " in done.stdout for word in WORDS), done.stderr


@pytest.mark.parametrize(
    "argv, meant",
    [
        (["trian", "lora.r=8"], "sft train lora.r=8"),
        (["lora.r=8"], "sft train lora.r=8"),
        (["-m", "lora.r=8,16"], "sft sweep lora.r=8,16"),
        (["show_run.py", "run=outputs/a"], "sft show run=outputs/a"),
        (["leader"], "sft leaderboard"),
        (["xyzzy"], "sft --help   lists the words"),
    ],
    ids=" ".join,
)
def test_an_unknown_word_is_refused_with_the_likeliest_command(argv, meant, typed, capsys):
    assert likeliest(argv) == meant
    assert main(argv) == 2 and f"hint: {meant}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed_words, given",
    [
        (["train", "lora.r=8"], ["lora.r=8"]),
        (["sweep", "lora.r=8,16"], ["-m", "lora.r=8,16"]),
        (["preflight", "lora.r=8"], ["lora.r=8", "preflight.mode=only"]),
        (["resume", "outputs/a b", "distributed.num_processes=2"], ["resume=outputs/a b", "distributed.num_processes=2"]),
        (["resume", "run=outputs/a"], ["resume=outputs/a"]),
        (["resume", "resume=outputs/a"], ["resume=outputs/a"]),
        (["resume"], ["resume="]),
        (["resume", "--help"], ["--help"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_word_is_train_py_with_other_words(typed_words, given):
    assert training_words(typed_words[0], typed_words[1:]) == given


@pytest.mark.parametrize("word", ["preview", "export", "leaderboard", "show", "chat", "install-gguf"])
def test_the_help_of_each_word_says_sft(word, typed, capsys):
    assert main([word, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"sft {word}" in shown and "scripts/" not in shown


def test_hints_are_commands_as_they_were_typed(monkeypatch):
    text = "python train.py -m lora.r=8   or   python scripts/show_run.py run=a\nscripts/preview.py\n"
    text += "python scripts/install_gguf.py"
    assert as_called(text) == text == Problem("a", "b", text).fix
    monkeypatch.setenv(VARIABLE, "1")
    assert Problem("a", "b", text).fix == "sft train -m lora.r=8   or   sft show run=a\nsft preview\nsft install-gguf"
    assert as_called("torchrun --nproc-per-node 2 train.py a=b") == "torchrun --nproc-per-node 2 -m sft train a=b"
    assert as_called('pip install -e ".[ray]"') == 'pip install -e ".[ray]"'  # of a checkout


@pytest.fixture
def place(typed, tmp_path, monkeypatch) -> Path:
    """As installed by pipx or `uv tool`: the folder of an environment whose programs the shell does not find."""
    (tmp_path / "env").mkdir()
    monkeypatch.setattr("sft.programs.INSTALLED", True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def put(file: Path) -> None:
    """An empty program."""
    file.touch(mode=0o755)


def test_hints_install_into_the_environment_that_sft_runs_in(place, monkeypatch):
    assert as_called("pip install -e .   brings") == f'{place}/env/python -P -m pip install "sft-lora"   brings'
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [])  # no pip in it
    assert as_called("pip install liger-kernel") == f"pip --python {place}/env/python install liger-kernel"
    put(place / "bin/uv")
    assert as_called('pip install -e ".[ray]"') == f'uv pip install --python {place}/env/python "sft-lora[ray]"'
    put(place / "env/pip")
    monkeypatch.setenv("PATH", str(place / "env"))  # which is activated
    assert as_called('pip install -e ".[ray]"') == 'pip install "sft-lora[ray]"'


def test_hints_find_the_programs_of_other_packages(place):
    put(place / "env/hf")
    assert as_called("then: hf auth login   or set HF_TOKEN") == f"then: {place}/env/hf auth login   or set HF_TOKEN"
    assert as_called("wandb login   or   tracking=wandb") == "wandb login   or   tracking=wandb"  # nowhere
    put(place / "bin/hf")
    assert as_called("hf auth login") == "hf auth login"


@pytest.mark.parametrize(
    "own_pip, tools, command",
    [(True, [], "-P -m pip install"), (False, ["uv"], "uv pip install"), (False, ["pip"], "pip --python")],
)
def test_ggufs_parts_are_installed_by_the_pip_or_uv_that_is_there(place, monkeypatch, own_pip, tools, command):
    ran = []
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [name] * bool(own_pip))
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: ran.append(argv) or subprocess.CompletedProcess(argv, 7))
    put(place / "env/python")
    for tool in tools:
        put(place / "bin" / tool)
    assert main(["install-gguf"]) == 7 and len(ran) == 1
    assert command in " ".join(ran[0]) and str(place / "env/python") in ran[0]


def test_without_pip_and_uv_ggufs_parts_are_not_installed_and_a_command_that_brings_pip_is_named(place, monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [])
    assert main(["install-gguf"]) == 1
    assert capsys.readouterr().err.endswith(f"hint: {place}/env/python -m ensurepip\n")


def test_the_recorded_command_is_the_one_that_was_typed(typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sft", "-m", "lora.r=8,16"])
    assert command_text() == "sft train -m lora.r=8,16"


def test_presets_in_conf_of_the_current_folder_are_found_and_win(own):
    assert read_settings(CONF, ["experiment=x"], hardware=False).lora.r == 4
    (own / "conf/model").mkdir()
    (own / "conf/model/tiny_random.yaml").write_text("name: tiny_random\nmax_seq_length: 77\n", encoding="utf-8")
    assert read_settings(CONF, ["model=tiny_random"], hardware=False).model.max_seq_length == 77
    assert read_settings(CONF, ["lora=r32"], hardware=False).lora.r == 32


def test_a_value_that_an_option_leaves_blank_is_null_in_the_hint(own):
    (own / "conf/experiment/x.yaml").write_text("# @package _global_\ntracking: {project: mine}\n", encoding="utf-8")
    with pytest.raises(Refusal) as refused:
        read_settings(CONF, ["experiment=x", "tracking=none"], hardware=False)
    assert [problem.fix for problem in refused.value.problems] == ["tracking.project=null   to have the option's values"]
    assert read_settings(CONF, ["experiment=x", "tracking=none", "tracking.project=null"]).tracking.project is None


def test_a_folder_that_is_named_is_searched_as_well(own):
    (own / "more/lora").mkdir(parents=True)
    (own / "more/lora/mine.yaml").write_text("r: 5\n", encoding="utf-8")
    assert read_settings(CONF, ["--config-dir", "more", "lora=mine"], hardware=False).lora.r == 5
    assert read_settings(CONF, ["--config-dir", "more", "experiment=x"], hardware=False).lora.r == 4


def test_a_primary_config_beside_the_user_is_left_aside_and_named(own, capsys):
    (own / "conf/config.yaml").write_text("a: 1\n", encoding="utf-8")
    assert read_settings(CONF, ["lora=r32"], hardware=False).lora.r == 32
    assert capsys.readouterr().err.count(f"{own}/conf is left aside") == 1
    with pytest.raises(Refusal):
        read_settings(CONF, ["experiment=x"], hardware=False)
    assert read_settings(CONF, ["--config-dir", "conf", "experiment=x"], hardware=False).lora.r == 4  # as the hint says


def test_a_relative_config_path_is_refused_with_the_one_that_works(own, typed, monkeypatch):
    monkeypatch.setattr(check, "_main_folder", lambda *_: CONF)
    with pytest.raises(Refusal) as refused:
        check_command_line(CONF, ["--config-path", "conf", "lora.r=8"], hardware=False)
    assert [problem.fix for problem in refused.value.problems] == [f"--config-path {own}/conf"]


def test_bash_completes_words_settings_and_presets_of_ones_own(own):
    script = 'eval "$(sft train -sc install=bash)"\n'
    lines = ["sft pre", "sft train experiment=", "sft sweep lora.r", "sft show ", "sft show run=conf/e", "sft train model=tiny"]
    lines += ["sft in", "sft init con", "sft init goal=re", "sft init model=tiny", "sft init from=con", "sft doctor "]
    for line in lines:
        words = line.split(" ")
        script += f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_CWORD={len(words) - 1}\n"
        script += "COMPREPLY=(); hydra_bash_completion; echo ${COMPREPLY[@]}\n"
    done = subprocess.run(["bash", "-c", script], env=write_program(own / "bin"), capture_output=True, text=True, timeout=120)
    found = [line.split() for line in done.stdout.splitlines()]
    assert found[0] == ["preview", "preflight"] and "experiment=x" in found[1] and "experiment=chat" in found[1], done.stderr
    assert found[2:6] == [["lora.r="], ["run="], ["run=conf/experiment"], ["model=tiny_random"]]
    own_words = [["init", "install-gguf"], ["conf"], ["goal=rewards"], ["model=tiny_random"], ["from=conf"], ["--json"]]
    assert found[6:] == own_words


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_words_and_presets_of_ones_own(own):
    lines = ["sft pre", "sft train experiment=", "sft preview model=tiny"]
    script = "sft train -sc install=fish | source; " + "".join(f'complete -C "{line}"; echo; ' for line in lines)
    environment = write_program(own / "bin") | {"HOME": str(own)}
    done = subprocess.run(["fish", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    found = [part.split() for part in done.stdout.split("\n\n")]
    assert set(found[0]) == {"preview", "preflight"} and {"experiment=x", "experiment=chat"} <= set(found[1]), done.stderr
    assert found[2] == ["model=tiny_random"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes_words_and_presets_of_ones_own(own):
    """In a terminal, because zsh completes nowhere else, with the lines of the guide in .zshrc."""
    (own / "conf/experiment/mine.yaml").write_text(EXPERIMENT, encoding="utf-8")
    setup = "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n"
    (own / ".zshrc").write_text(f'{setup}eval "$(sft train -sc install=zsh)"\nPS1=ready\n', encoding="utf-8")
    environment = write_program(own / "bin") | {"ZDOTDIR": str(own), "TERM": "dumb"}
    terminal, its_end = os.openpty()
    zsh = subprocess.Popen(
        ["zsh", "-i"], env=environment, stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True
    )
    os.close(its_end)
    try:
        for wanted, keys in [("ready", "sft tra\t"), ("sft train", " experiment=mi\t"), ("experiment=mine", "")]:
            shown = ""
            while wanted not in shown:
                assert select.select([terminal], [], [], 30)[0], (wanted, shown)
                shown += os.read(terminal, 4096).decode(errors="replace")
            os.write(terminal, keys.encode())
    finally:
        zsh.kill()
        zsh.wait()
        os.close(terminal)


@pytest.mark.slow
def test_a_wheel_trains_in_a_folder_that_knows_no_checkout(own):
    """Built and installed as pip does it; the packages are those of this environment. It prints what the guide shows."""
    environment = transcript.install(own)
    place = own / "site"
    packed = {file.relative_to(CONF) for file in CONF.rglob("*.yaml")}
    assert {file.relative_to(place / "sft/conf") for file in (place / "sft/conf").rglob("*.yaml")} == packed
    assert {file.name for file in (place / "sft/assets").iterdir()} >= {file.name for file in (ROOT / "sft/assets").iterdir()}

    folder = own / "mine"
    folder.mkdir()
    page = transcript.make_page(folder, environment)
    assert transcript.without_numbers(page) == transcript.without_numbers(transcript.TARGET.read_text(encoding="utf-8"))
    run = json.loads((folder / "outputs/first/run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished" and run["settings"]["dataset"]["path"] == "faq.csv" and not run.get("git_commit")
    assert run["command"].startswith("sft train experiment=faq ")

    def sft(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["sft", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)

    resumed = sft("resume", "outputs/first")
    assert resumed.returncode == 2 and "hint: sft train experiment=faq" in resumed.stderr
    assert sft("show", "run=outputs/first").returncode == 0 and (folder / "outputs/first/curves.png").is_file()
    ranked = sft("leaderboard")
    assert ranked.returncode == 2 and "hint: sft train -m lora.r=8,16" in ranked.stderr
