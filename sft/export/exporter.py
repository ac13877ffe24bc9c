"""A trained run to its exports, in the order it happens: measure the trained model, merge, convert, prove, describe, push.

One model is in memory at a time. Whatever fails, the trained weights and the exports made before stay as they are.
"""

import functools
import logging
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from sft import environment
from sft.config.consent import with_word
from sft.config.schema import Settings
from sft.data.tokenize import starts_with_bos
from sft.errors import ExportError, HubError, Problem, Refusal, first_line
from sft.export import card, gguf, hub, measure, merge, ollama, verify
from sft.export.proving import (
    Trained,
    attempt,
    base_loss,
    compare_gguf,
    compare_with_training,
    completions_of,
    measure_weights,
    note_result,
    prove_folder,
    reference_facts,
)
from sft.export.requirements import FORMATS, check_export
from sft.export.rewarding import find_rewarding
from sft.model import structure
from sft.model.tokenizer import read_tokenizer
from sft.programs import as_called
from sft.runs import resume
from sft.runs.saved import prompt_form
from sft.storage import atomic, jsonio
from sft.storage.jsonio import read_json

log = logging.getLogger(__name__)


def export_run(folder: Path, settings: Settings, weights: Path | None = None) -> dict[str, Any]:
    """Make what `settings.export` asks for of a finished run, verify it, and push what holds.

    `settings` are the run's own with the export's in place; `weights` may name a checkpoint in place of the kept weights.
    Returns the contents of export/verify.json, where every artifact has a status: `ok`, `failed` or `error`. Raises
    Refusal before anything is made, if something is known to be missing.
    """
    problems = check_export(folder, settings)
    if problems:
        raise Refusal(problems)
    place = folder / "export"
    place.mkdir(exist_ok=True)
    why = "Another process is exporting this run."
    taken = Problem(f"run={folder}", why, "wait until it ends, or stop it with Ctrl-C")
    with resume.locked(place, taken, seconds=5):  # one whose run was killed a moment ago is on its way out
        try:
            return _export(folder, settings, weights)
        except OSError as error:  # a disk that is full or fails, outside of a single artifact
            raise ExportError(f"the export could not go on: {first_line(error)}") from error


def _export(folder: Path, settings: Settings, weights: Path | None) -> dict[str, Any]:
    wanted = settings.export
    _clear_leftovers(folder / "export")
    trained = read_trained(folder, settings, weights)
    with_merged = {"merged_16bit", "merged_4bit", "gguf"} & set(wanted.formats)
    report: dict[str, Any] = {"artifacts": {}, "files": _earlier_files(folder), "made_at": jsonio.now()}
    started = time.monotonic()
    log.info("Export %s of %s", ", ".join(wanted.formats), os.path.relpath(trained.weights))
    model = merge.load_trained(settings, trained.weights)
    trained.config = merge.config_of(model)
    trained.rows = measure.complete_rows(
        model, trained.rows, trained.new_tokens, trained.stop_ids, trained.tokenizer.pad_token_id)  # fmt: skip
    reference = measure_weights(model, trained, wanted)
    report["reference"] = reference_facts(trained, reference, base_loss(model, trained))
    checks, facts = compare_with_training(trained, reference)
    note_result(
        trained,
        report,
        "adapter",
        trained.weights,
        checks,
        {**facts, "peak_memory_gib": environment.peak_memory_gib()},
        started,
    )
    merged = folder / "export" / "merged_16bit" if "merged_16bit" in wanted.formats else folder / "export" / ".merged_16bit"
    try:
        if with_merged:
            begun = time.monotonic()
            in_fp8 = bool(structure.rounding_of(model))
            if getattr(model, "is_quantized", False) or in_fp8:
                del model
                environment.release_memory()
                model = merge.load_trained(settings, trained.weights, quantised=False)
            if in_fp8:  # what is merged is not what was trained: the weights before they were rounded
                report["as_trained"], reference = report["reference"], measure_weights(model, trained, wanted)
                report["reference"] = reference_facts(trained, reference, base_loss(model, trained))
                log.info("       as trained in FP8 loss %.4f, with the weights as they were %.4f",
                         report["as_trained"]["loss"], reference.loss)  # fmt: skip
            model = merge.merge(model)
            try:
                merge.save(model, trained.tokenizer, trained.stop_ids, merged, _source(trained))
            except Exception as error:  # safetensors raises its own on a full disk
                raise ExportError(f"the merged weights could not be saved: {first_line(error)}") from error
            if "merged_16bit" in wanted.formats:
                _list_folder(report, merged)
        del model
        environment.release_memory()
        if "adapter" in wanted.formats and attempt(report, "adapter", lambda: _copy_adapter(trained)):
            _list_folder(report, folder / "export" / "adapter")
        rounded = None
        if "merged_16bit" in wanted.formats:
            rounded = prove_folder(trained, report, reference, "merged_16bit", merged, None, begun)
        if "merged_4bit" in wanted.formats:
            _make_4bit(trained, report, reference, merged)
        if "gguf" in wanted.formats:
            _make_gguf(trained, report, reference, rounded, merged)
    finally:
        if merged.name.startswith("."):
            shutil.rmtree(merged, ignore_errors=True)
    jsonio.write_json(folder / "export" / "verify.json", _with_earlier(folder, report))
    _describe_and_push(folder, settings, report)
    jsonio.write_json(folder / "export" / "verify.json", _with_earlier(folder, report))
    return report


def _clear_leftovers(place: Path) -> None:
    """Remove what an export that was killed had in hand."""
    atomic.remove_leftovers(place, *FORMATS, "verify.json")
    for left in (place / "gguf").glob(".model-*"):
        left.unlink(missing_ok=True)
    shutil.rmtree(place / ".merged_16bit", ignore_errors=True)


def push_run(folder: Path, settings: Settings) -> dict[str, Any]:
    """Push the exports that are on disk and hold, without making them again; returns export/verify.json's contents.

    Raises Refusal if there are none, or the hub would not take them.
    """
    report = read_json(folder / "export" / "verify.json")
    made = [
        f
        for f in FORMATS
        if any(n.split("/")[0] == f for n in report.get("artifacts") or {}) and (folder / "export" / f).is_dir()
    ]
    if not made:
        fix = f"python scripts/export.py {shlex.quote(f'run={folder}')} export=merged_16bit   makes one"
        raise Refusal([Problem(f"run={folder} push=true", "It has no exports yet.", fix)])
    settings.export.formats = [f for f in settings.export.formats if f in made] or made
    wanted = settings.export
    problems = hub.check_access(wanted.hub.repo, wanted.formats, wanted.hub.private)
    if problems:
        raise Refusal(problems)
    _describe_and_push(folder, settings, report)
    jsonio.write_json(folder / "export" / "verify.json", report)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """One line for each artifact that is not what was trained, could not be made, or could not be pushed."""
    lines = []
    for name, facts in (report.get("artifacts") or {}).items():
        facts = facts or {}
        if facts.get("status") == "failed":
            wrong = [c for c in facts.get("checks") or [] if c and not c.get("ok")]
            found = [f"{c.get('name')}: expected {c.get('expected')}, found {c.get('found')}" for c in wrong]
            lines.append(f"{name}: " + "; ".join(found) + _advice(name, [c.get("name") for c in wrong]))
        elif facts.get("status") != "ok":
            lines.append(f"{name}: {facts.get('error') or 'verify.json does not say that it holds'}")
    pushes = (report.get("hub") or {}).items()
    return lines + [f"push of {name}: {push['error']}" for name, push in pushes if push and push.get("error")]


def _advice(name: str, wrong: list[str]) -> str:
    """What to export in place of an artifact whose loss alone is too high, because its weights were rounded."""
    kind = name.rpartition("/")[2]
    if wrong != ["loss"] or kind in ("adapter", "merged_16bit", "f32", "f16", "bf16", "q8_0"):
        return ""
    fix = "export=merged_16bit" if kind == "merged_4bit" else "'export.gguf.quantizations=[q8_0]'"
    return f" (its rounding takes too much of what was trained; {fix} rounds less)"


def read_trained(folder: Path, settings: Settings, weights: Path | None) -> Trained:
    """Everything of the run but the model. Raises ExportError if the run folder lacks a part, Refusal if it is damaged."""
    record = read_json(folder / "run.json")
    weights = weights or folder / ("adapter" if settings.lora.enabled else "model")
    try:
        rows = measure.read_rows(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"the run folder is not whole: {first_line(error)}") from error
    tokenizer, stop_ids = read_tokenizer(weights, settings.model.trust_remote_code, prompt_form(folder)[1])
    prompts = [measure.prompt_of(row) for row in rows[: settings.export.num_prompts]]
    adds_bos = starts_with_bos(tokenizer)
    texts = [tokenizer.decode(ids[1:] if adds_bos and ids[:1] == [tokenizer.bos_token_id] else ids) for ids in prompts]
    questions = [row.question for row in rows[: settings.export.num_prompts]]
    tokens = verify.read_tokens(tokenizer, stop_ids, texts, questions)
    dtype = str((record.get("model") or {}).get("dtype", "torch.float32")).removeprefix("torch.")
    rewarding = find_rewarding(folder, settings, record, rows[: settings.export.num_prompts], tokenizer)
    return Trained(folder, settings, record, weights, rows, tokenizer, stop_ids, texts, tokens, dtype, *rewarding)


# ------------------------------------------------------------------------------------------------ the formats


def _copy_adapter(trained: Trained) -> None:
    with atomic.new_folder(trained.folder / "export" / "adapter", manifest=False) as work:
        keep = ("adapter_config.json", "adapter_model.safetensors")
        for name in keep:
            shutil.copy(trained.weights / name, work / name)
        trained.tokenizer.save_pretrained(work)


def _make_4bit(trained: Trained, report: dict, reference: measure.EvalResult, merged: Path) -> None:
    place, begun = trained.folder / "export" / "merged_4bit", time.monotonic()
    if attempt(report, "merged_4bit", lambda: merge.save_4bit(merged, place)):
        _list_folder(report, place)
        environment.release_memory()
        limit = trained.settings.export.max_loss_increase
        prove_folder(trained, report, reference, "merged_4bit", place, limit, begun)


def _make_gguf(
    trained: Trained, report: dict, reference: measure.EvalResult, rounded: measure.EvalResult | None, merged: Path
) -> None:
    """One file a type; f16 is made for all of them, and kept if it was requested.

    `rounded` is what the merged 16-bit weights do in transformers, if that is known already.
    """
    wanted, place = trained.settings.export, trained.folder / "export" / "gguf"
    kinds = wanted.gguf.quantizations
    whole = place / ("model-f16.gguf" if "f16" in kinds else ".model-f16.gguf")
    if rounded is None and set(kinds) & set(gguf.HIGH_PRECISION):
        rounded = completions_of(trained, merged)

    def prove(kind: str, file: Path, begun: float) -> None:
        limit = None if kind in gguf.HIGH_PRECISION else wanted.max_loss_increase
        note_result(trained, report, f"gguf/{kind}", file, *compare_gguf(trained, reference, rounded, file, limit), begun)

    try:
        for kind in sorted(kinds, key=lambda k: k != "f16"):
            name, file, begun = f"gguf/{kind}", place / f"model-{kind}.gguf", time.monotonic()
            made = True
            if not whole.exists() or kind == "f16":
                made = attempt(report, name, lambda: gguf.convert(merged, whole))
            if made and kind != "f16":
                if kind in gguf.HIGH_PRECISION:
                    made = attempt(report, name, lambda k=kind, f=file: gguf.convert(merged, f, k))
                else:
                    made = attempt(report, name, lambda k=kind, f=file: gguf.quantise(whole, f, k))
            if made:
                _list_gguf(report, file)
                _write_modelfile(trained, report, file)
                attempt(report, name, functools.partial(prove, kind, file, begun))
        if wanted.gguf.adapter:
            _make_gguf_adapter(trained, report, merged, whole)
    finally:
        if whole.name.startswith("."):
            whole.unlink(missing_ok=True)


def _write_modelfile(trained: Trained, report: dict, file: Path) -> None:
    """Put an Ollama Modelfile beside a GGUF file, or say why Ollama could not render the prompts of the training."""
    try:
        shape, stops = prompt_form(trained.folder)
        place = ollama.write_modelfile(file.parent, file.name, trained.settings, shape, trained.tokenizer, stops)
        _list_gguf(report, place)
    except ExportError as error:
        report["modelfile"] = str(error)
        log.warning("%s: %s", file.name, error)


def _make_gguf_adapter(trained: Trained, report: dict, merged: Path, whole: Path) -> None:
    file, begun = trained.folder / "export" / "gguf" / "adapter.gguf", time.monotonic()

    def make() -> None:
        if not whole.exists():
            gguf.convert(merged, whole)
        layers = gguf.write_adapter(trained.weights, merged, whole, file, _has_tied_ends(trained))
        _list_gguf(report, file)
        text = f"{layers} layers in the order of llama.cpp's own converter"
        note_result(trained, report, "gguf/adapter", file, [verify.Check("tensors", True, text, text)], {}, begun)

    attempt(report, "gguf/adapter", make)


def _with_earlier(folder: Path, report: dict) -> dict:
    """The report with the artifacts of earlier exports that are still there."""
    earlier = read_json(folder / "export" / "verify.json")
    kept = {
        name: facts
        for name, facts in (earlier.get("artifacts") or {}).items()
        if name not in report["artifacts"] and facts and os.path.exists(folder / (facts.get("path") or "?"))
    }
    return {**report, "artifacts": {**kept, **report["artifacts"]}}


# ------------------------------------------------------------------------------- what the export wrote, for a push


def _list_folder(report: dict, place: Path) -> None:
    """Note the files of an export's folder, which has just been put in place as a whole."""
    report["files"][place.name] = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())


def _list_gguf(report: dict, file: Path) -> None:
    """Note one file of export/gguf/, in which those of earlier exports stay."""
    report["files"]["gguf"] = sorted({*report["files"].get("gguf", []), file.name})


def _written(report: dict, format: str) -> list[str] | None:
    """The files that an export wrote, relative to its folder; None where verify.json does not say."""
    files = report.get("files")
    names = files.get(format) if isinstance(files, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else None


def _earlier_files(folder: Path) -> dict[str, list[str]]:
    """The lists of earlier exports; GGUF files from before there were lists are known by their artifacts."""
    earlier = read_json(folder / "export" / "verify.json")
    files = {format: names for format in FORMATS if (names := _written(earlier, format)) is not None}
    kinds = [n.partition("/")[2] for n in earlier.get("artifacts") or {} if n.startswith("gguf/")]
    names = [name for k in kinds for name in (f"model-{k}.gguf", f"Modelfile.{k}", f"{k}.gguf")]
    if kinds and "gguf" not in files:
        files["gguf"] = [name for name in names if (folder / "export" / "gguf" / name).is_file()]
    return files


# ------------------------------------------------------------------------------------------- the card and the hub


def _describe_and_push(folder: Path, settings: Settings, report: dict) -> None:
    """Write a card for each format and push those of which every artifact holds."""
    wanted, repo = settings.export, settings.export.hub.repo
    for format in wanted.formats:
        place = folder / "export" / format
        if not place.is_dir():
            continue
        card.write_card(place, folder, format, repo)
        if not repo:
            continue
        rows = {n: f or {} for n, f in report["artifacts"].items() if n == format or n.startswith(f"{format}/")}
        drifted = [name for name, facts in rows.items() if facts.get("status") != "ok"]
        pushed = report["hub"] = report.get("hub") or {}
        if drifted:
            pushed[format] = {"error": f"not pushed, because of {', '.join(drifted)}"}
        else:
            try:
                url = hub.push(place, repo, format, wanted.hub.private, _written(report, format))
                pushed[format] = {"url": url}
                log.info("       pushed        %s", pushed[format]["url"])
            except HubError as error:
                again = as_called(f"python scripts/export.py run={os.path.relpath(folder)} push=true export.hub.repo={repo}")
                again = with_word(again, settings)
                pushed[format] = {"error": str(error), "again": again}
                log.error("%s was not pushed: %s\nhint: %s", format, error, again)


def _source(trained: Trained) -> str:
    from sft.model import hub

    return hub.locate(trained.settings.model)[0]


def _has_tied_ends(trained: Trained) -> bool:
    """Whether the base's output layer and its embeddings are one weight."""
    from transformers import AutoConfig

    model = trained.settings.model
    config = AutoConfig.from_pretrained(_source(trained), revision=model.revision, trust_remote_code=model.trust_remote_code)
    return bool(config.get_text_config().tie_word_embeddings)
