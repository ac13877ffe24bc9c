"""Around a run: a quiet environment, the hub within reach, seeds and memory."""

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from urllib.parse import urlsplit

from sft.errors import first_line, is_page, refuse
from sft.sanitize import without_passwords
from sft.storage.cache import cache_dir
from sft.threads import spin_briefly

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------ around the imports

atexit.register(gc.freeze)  # so that Python, as it ends, does not search all that was imported for garbage: more than a second


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Search for no garbage within this: imports leave half a million objects that stay, and to search them again and again
    takes a sixth of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def prepare_environment() -> None:
    """Set what the libraries read when they are imported: no telemetry, no caches in the working folder.

    A value that the user has set stays.
    """
    spin_briefly()
    cache = cache_dir()
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_ERROR_REPORTING": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth_compiled"),
        "TOKENIZERS_PARALLELISM": "false",  # tokenising happens before anything forks
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_SILENT": "true",
    }.items():
        os.environ.setdefault(name, value)
    if not hub_reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else every look-up is tried again and again, for half a minute
    for name in ("datasets", "trl", "peft", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub (or the mirror in HF_ENDPOINT) accepts a connection within `timeout` seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout):
            return True
    except OSError:
        return False


@importing()
def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and info lines out of the run's output. Call after importing the backend."""
    import datasets
    import transformers

    # PEFT's about an adapter on tied embeddings: they are saved whole, and sft/export/merge.py parts them.
    tied = (
        "Model (has|with) `tie_word_embeddings",
        "Input and output embeddings are no longer tied",
        "Setting `save_embedding_l",
    )
    for message in tied:
        warnings.filterwarnings("ignore", message)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------- seeds, memory, signals


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    from transformers import set_seed

    set_seed(seed)


def peak_memory_gib() -> float:
    """Most memory the run has held so far in GiB: of the GPU as torch reserved it, else of the process."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / 2**30, 3)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**30 if sys.platform == "darwin" else peak / 2**20, 3)


def peak_allocated_gib() -> float | None:
    """Most GPU memory that tensors held at one time so far, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if torch.cuda.is_available() else None


def release_memory() -> None:
    """Give back what a finished job no longer needs, so that the next one in this process has it."""
    gc.collect()
    with contextlib.suppress(
        AttributeError, OSError, TypeError
    ):  # only glibc has it: pages that are free go back to the system
        ctypes.CDLL(None).malloc_trim(0)
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def hub_unreachable(what: str, error: Exception, local: str):
    """The refusal of a download that failed, naming the mirror variable and the local way."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    why = f"The hub at {without_passwords(endpoint)} could not be reached: {first_line(error)}"
    if is_page(error):
        why = f"{without_passwords(endpoint)} answered with a page that is not the hub's (a proxy or a login page?)."
    fix = "HF_ENDPOINT=https://hf-mirror.com python train.py ...   where only a mirror can be reached"
    fix += f"\n{local}   for a local copy"
    return refuse(what, why, fix)
