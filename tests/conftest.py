"""Shared by all tests: no network, no accounts, composed settings, and SmolLM2's tokenizer with copies that differ from it."""

import contextlib
import copy
import functools
import gc
import json
import os
import pickle
import signal
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Set before any library is imported; subprocesses inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    NETRC="/nonexistent",
)
if not os.environ.get("SFT_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_ENDPOINT"):
    os.environ.pop(name, None)

import jinja2
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from sft.config.compose import register, to_settings
from sft.config.schema import Settings
from sft.environment import prepare_environment
from sft.model import builtin, warm_cache
from sft.model import tokenizer as model_tokenizer
from sft.storage.cache import cache_dir, made_once
from tests import composing

prepare_environment()
register()
composing.install()
os.fsync = lambda descriptor: None  # that a disk has it is seen after a power cut alone; a tiny run waits sixty times for it


@functools.cache
def _pickled(text: str) -> bytes | None:
    """The config of a file's text; None for one that is no table, or wrong."""
    try:
        plain = yaml.load(text, Loader=get_yaml_loader())
    except (yaml.YAMLError, ValueError):
        return None
    return pickle.dumps(OmegaConf.create(plain)) if isinstance(plain, dict) else None


def _load_yaml(file, load=OmegaConf.load):
    """As OmegaConf.load; Hydra reads the same files a thousand times, a fifth of what composing takes."""
    if hasattr(file, "read"):
        if pickled := _pickled(file.read()):
            return pickle.loads(pickled)
        file.seek(0)
    return load(file)


OmegaConf.load = staticmethod(_load_yaml)

_code: dict[tuple, object] = {}


def _compile(environment, source, *more, compile=jinja2.Environment.compile, **named):
    """As Environment.compile, once for a text of an environment: PEFT's model card is written with each checkpoint."""
    if not isinstance(source, str) or named:
        return compile(environment, source, *more, **named)
    key = environment, source, *more
    if key not in _code:
        _code[key] = compile(environment, source, *more)
    return _code[key]


jinja2.Environment.compile = _compile
metadata.version = functools.cache(metadata.version)  # each run asks for fifty, a tenth of a tiny one

TOKENS = 4096


def _write_few_tokens(folder: Path) -> None:
    """tiny_random with the first TOKENS of its 49,152 tokens: most of what a tiny run does is for the others."""
    from safetensors.torch import load_file, save_file

    builtin._build_tiny_random(folder)
    tokens, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("tokenizer.json", "config.json"))
    kept = {token: number for token, number in tokens["model"]["vocab"].items() if number < TOKENS}
    tokens["model"] |= {"vocab": kept, "merges": [pair for pair in tokens["model"]["merges"] if "".join(pair) in kept]}
    for name, content in (("tokenizer.json", tokens), ("config.json", {**config, "vocab_size": TOKENS})):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:TOKENS].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


USERS_CACHE = cache_dir().parent if cache_dir().name == f"tests-{TOKENS}" else cache_dir()  # ours where a test has set it


@pytest.fixture(scope="module")
def all_tokens():
    """tiny_random with all its tokens in the module's tests: llama.cpp knows no other, and with few it says less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE", str(USERS_CACHE))
        yield


def _use_own_cache() -> None:
    """Have `model=tiny_random` be that one in all tests and in what they start; SmolLM2 is the user's own."""
    os.environ["SFT_CACHE"] = str(USERS_CACHE / f"tests-{TOKENS}")
    os.environ["TRACKIO_DIR"] = str(cache_dir() / "trackio")  # read where it is imported
    made_once(f"models/tiny-random-v{builtin.VERSION}", _write_few_tokens)
    for kept in USERS_CACHE.glob("models/smollm2-*"):
        with contextlib.suppress(FileExistsError):
            (cache_dir() / "models" / kept.name).symlink_to(kept)


if not os.environ.get("SFT_TEST_GPU"):
    _use_own_cache()

# Seconds instead of minutes: two random layers, a few rows of the shipped data, short answers.
SMALL = ("model=tiny_random", "dataset.max_rows=24", "samples.num_held_out=2", "samples.max_new_tokens=8", "tracking=none")


def make_settings(*overrides: str) -> Settings:
    """Settings composed as train.py composes them."""
    return copy.deepcopy((_compose.__wrapped__ if "${" in str(overrides) else _compose)(*overrides))


@functools.cache  # composing takes a tenth of a second
def _compose(*overrides: str) -> Settings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_settings(compose("config", overrides=list(overrides)))


def in_one_process(commands: list[list[str]]) -> list[str]:
    """The command of a process that runs train.py with each of these words, in turn, and prints `code N` after each."""
    program = f"""import runpy, sys
for words in {commands!r}:
    sys.argv = [{str(ROOT / "train.py")!r}, *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("code", end.code)
"""
    return [sys.executable, "-c", program]


def freeze_libraries() -> None:
    """The garbage collector looks no more through what the libraries and the collected tests hold: half of a tiny run."""
    if len(sys.modules) > _frozen["modules"] + 100:
        gc.collect()
        gc.freeze()
        _frozen["modules"] = len(sys.modules)


_frozen = {"modules": 0}
"""How many modules were loaded when what they hold was frozen. gc.get_freeze_count() would take a tenth of a second a test."""


def _unfreeze(unfreeze=gc.unfreeze) -> None:
    _frozen["modules"] = 0
    unfreeze()


gc.unfreeze = _unfreeze


@pytest.fixture(autouse=True)
def frozen_libraries(monkeypatch):
    """What a test before this one has loaded is frozen too, and a run that ends leaves it so."""
    freeze_libraries()
    monkeypatch.setattr(warm_cache, "_frozen", True)


@pytest.fixture
def forked_children(monkeypatch):
    """What a test in this process starts of the project (ranks, jobs, exports) is forked: tests/forked.py."""
    from tests import forked

    monkeypatch.setattr("subprocess.Popen", forked.popen)


@pytest.fixture(autouse=True)
def no_service_of_another_test():
    """W&B leaves the address of its service in the environment; a program that a later test starts would look for it there."""
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def settings_of():
    """`settings_of("lora.r=8")`: composed settings."""
    return make_settings


@pytest.fixture
def small():
    """`small("lora.r=8")`: composed settings of a run that takes seconds."""
    return lambda *overrides: make_settings(*SMALL, *overrides)


@pytest.fixture(scope="session")
def loaded_tokenizer():
    """SmolLM2's tokenizer and stop tokens, as a run loads them. Not to be changed: take `make_tokenizer`."""
    return model_tokenizer.load_tokenizer(Settings().model)


@pytest.fixture(scope="session")
def tokenizer(loaded_tokenizer):
    return loaded_tokenizer[0]


@pytest.fixture(scope="session")
def make_tokenizer(tokenizer):
    """`make_tokenizer(chat_template, bos=..., adds_bos=True, special=(...,), eos=..., pad=...)`: a changed copy.

    It is shared by all who ask for the same.
    """
    from tokenizers.processors import TemplateProcessing

    @functools.cache  # a copy takes half a second
    def make(chat_template=None, bos=None, adds_bos=False, special=(), eos=None, pad=None):
        made = copy.deepcopy(tokenizer)
        made.chat_template = chat_template
        made.add_special_tokens({"additional_special_tokens": list(special)})
        for name, value in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)):
            if value:
                made.add_special_tokens({name: value})
        if adds_bos:
            made.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{made.bos_token} $A", special_tokens=[(made.bos_token, made.bos_token_id)]
            )
        return made

    return make


def pytest_configure() -> None:
    # A shell lets what it starts with `&` ignore Ctrl-C, and so would every process that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Two workers that take a file at a time end together if those of half a minute and more come first.
LONG_FILES = ("integration/test_dpo", "export_gguf", "integration/test_distributed", "integration/test_grpo",
              "config/test_refus", "integration/test_safety", "padding_free", "data/test_properties",
              "integration/test_families", "test_presets", "start_from", "test_resume", "backends", "integration/test_sweep",
              "integration/test_export", "warm_cache", "cli/test_init", "test_sft_command", "data/test_hints",
              "cli/test_composition", "test_command", "test_folders", "integration/test_run", "integration/test_chat",
              "test_hints_elsewhere", "project/test_guides", "integration/test_hub", "cli/test_conversion", "data/test_prepare",
              "data/test_files", "test_notebook", "preflight/test_checks", "test_lora_extra",
              "data/test_conversations")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why GPU tests and those of many minutes are skipped; the files that take longest come first."""
    ranks = {path: [name in str(path) for name in (*LONG_FILES, "")].index(True) for path in {item.path for item in items}}
    items.sort(key=lambda item: ranks[item.path])
    reasons = {
        "gpu": ("SFT_TEST_GPU", "needs an NVIDIA GPU; run with SFT_TEST_GPU=1 on a machine that has one"),
        "long": ("SFT_TEST_LONG", "takes many minutes; run with SFT_TEST_LONG=1 (make test-long)"),
    }
    for item in items:
        for mark, (variable, reason) in reasons.items():
            if item.get_closest_marker(mark) and not os.environ.get(variable):
                item.add_marker(pytest.mark.skip(reason=reason))
