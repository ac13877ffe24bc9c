"""A trained run to its exports, in the order it happens: measure the trained model, merge, convert, prove, describe, push.

One model is in memory at a time. Whatever fails, the trained weights and the exports made before stay as they are.
"""

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft import durable, resume, runtime
from sft.errors import ExportError, HubError, Problem, Refusal, first_line
from sft.export import card, gguf, hub, merge, modelfile, proof, verify
from sft.records import read_json, read_lines
from sft.render import starts_with_bos
from sft.runs import check_base, prompt_form
from sft.settings import Bias, ExportSettings, Settings
from sft.trust import with_word

log = logging.getLogger(__name__)

FORMATS = ("adapter", "merged_16bit", "merged_4bit", "gguf")


@dataclass
class Trained:
    """The trained run, as an export needs it."""

    folder: Path
    settings: Settings
    record: dict[str, Any]
    weights: Path
    """adapter/, model/ or a checkpoint."""
    rows: list[proof.Row]
    tokenizer: Any
    stop_ids: list[int]
    texts: list[str]
    """The text of each compared prompt, without the BOS that a tokenizer adds by itself."""
    tokens: verify.Tokens
    dtype: str
    """Type the model computes in: float32, bfloat16 or float16."""


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
    report: dict[str, Any] = {"artifacts": {}, "files": _earlier_files(folder), "made_at": runtime.now()}
    started = time.monotonic()
    log.info("Export %s of %s", ", ".join(wanted.formats), os.path.relpath(trained.weights))
    model = merge.load_trained(settings, trained.weights)
    reference = _measure_torch(model, trained, wanted)
    report["reference"] = _reference_facts(trained, reference, _base_loss(model, trained))
    checks, facts = _anchor(trained, reference)
    _note(trained, report, "adapter", trained.weights, checks, {**facts, "peak_memory_gib": runtime.peak_memory_gib()}, started)
    merged = folder / "export" / "merged_16bit" if "merged_16bit" in wanted.formats else folder / "export" / ".merged_16bit"
    try:
        if with_merged:
            begun = time.monotonic()
            if getattr(model, "is_quantized", False):
                del model
                runtime.release_memory()
                model = merge.load_trained(settings, trained.weights, quantised=False)
            model = merge.merge(model)
            try:
                merge.save(model, trained.tokenizer, trained.stop_ids, merged, _source(trained))
            except Exception as error:  # safetensors raises its own on a full disk
                raise ExportError(f"the merged weights could not be saved: {first_line(error)}") from error
            if "merged_16bit" in wanted.formats:
                _list_folder(report, merged)
        del model
        runtime.release_memory()
        if "adapter" in wanted.formats and _attempt(report, "adapter", lambda: _copy_adapter(trained)):
            _list_folder(report, folder / "export" / "adapter")
        rounded = None
        if "merged_16bit" in wanted.formats:
            rounded = _prove_folder(trained, report, reference, "merged_16bit", merged, None, begun)
        if "merged_4bit" in wanted.formats:
            _make_4bit(trained, report, reference, merged)
        if "gguf" in wanted.formats:
            _make_gguf(trained, report, reference, rounded, merged)
    finally:
        if merged.name.startswith("."):
            shutil.rmtree(merged, ignore_errors=True)
    runtime.write_json(folder / "export" / "verify.json", _with_earlier(folder, report))
    _describe_and_push(folder, settings, report)
    runtime.write_json(folder / "export" / "verify.json", _with_earlier(folder, report))
    return report


def _clear_leftovers(place: Path) -> None:
    """Remove what an export that was killed had in hand."""
    durable.remove_leftovers(place, *FORMATS, "verify.json")
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
        raise Refusal([Problem(f"run={folder} push=true", "It has no exports yet.", f"run={folder} export=merged_16bit")])
    settings.export.formats = [f for f in settings.export.formats if f in made] or made
    wanted = settings.export
    problems = hub.check_access(wanted.hub.repo, wanted.formats, wanted.hub.private)
    if problems:
        raise Refusal(problems)
    _describe_and_push(folder, settings, report)
    runtime.write_json(folder / "export" / "verify.json", report)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """One line for each artifact that is not what was trained, could not be made, or could not be pushed."""
    lines = []
    for name, facts in (report.get("artifacts") or {}).items():
        facts = facts or {}
        if facts.get("status") == "failed":
            wrong = [c for c in facts.get("checks") or [] if c and not c.get("ok")]
            told = [f"{c.get('name')}: expected {c.get('expected')}, found {c.get('found')}" for c in wrong]
            lines.append(f"{name}: " + "; ".join(told))
        elif facts.get("status") != "ok":
            lines.append(f"{name}: {facts.get('error') or 'verify.json does not say that it holds'}")
    pushes = (report.get("hub") or {}).items()
    return lines + [f"push of {name}: {push['error']}" for name, push in pushes if push and push.get("error")]


def check_export(folder: Path, settings: Settings) -> list[Problem]:
    """What can be known to keep an export from working before a weight is loaded: the base, parts, the disk, the hub."""
    wanted, problems = settings.export, check_base(folder, settings) if settings.lora.enabled else []
    if "gguf" in wanted.formats:
        problems += gguf.missing_parts()
    problems += check_disk(folder, settings)
    if wanted.hub.repo and not problems:
        problems += hub.check_access(wanted.hub.repo, wanted.formats, wanted.hub.private)
    return problems


def check_disk(folder: Path, settings: Settings) -> list[Problem]:
    """Whether the disk holds what `settings.export` would write, by the number of parameters in run.json."""
    parameters = (read_json(folder / "run.json").get("model") or {}).get("parameters")
    need = sum(bytes_a_parameter(settings.export).values()) * (parameters or 0)
    free = shutil.disk_usage(folder).free
    if need <= free:
        return []
    formats = ",".join(settings.export.formats)
    why = f"It needs about {need / 2**30:.1f} GiB on the disk of {folder}, and {free / 2**30:.1f} GiB are free."
    return [Problem(f"export.formats=[{formats}]", why, "free some space, or ask for fewer formats at a time")]


def count_artifacts(wanted: ExportSettings) -> int:
    """How many artifacts are made and proven one by one."""
    kinds = len(wanted.gguf.quantizations) + wanted.gguf.adapter if "gguf" in wanted.formats else 0
    return len({*wanted.formats} - {"gguf"}) + kinds


def bytes_a_parameter(wanted: ExportSettings) -> dict[str, float]:
    """Bytes a parameter of each file, those in between included; by llama.cpp's bits a weight, with a little over."""
    sizes = {"merged 16-bit": 2.0} if {"merged_16bit", "merged_4bit", "gguf"} & set(wanted.formats) else {}
    sizes |= {"merged 4-bit": 0.8} if "merged_4bit" in wanted.formats else {}
    if "gguf" in wanted.formats:
        known = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07, "q6_k": 0.85, "q5_k_m": 0.75, "q4_k_m": 0.65}
        sizes |= {"GGUF f16": 2.0} | {f"GGUF {q}": known.get(q, 0.75) for q in wanted.gguf.quantizations if q != "f16"}
    return sizes


def read_trained(folder: Path, settings: Settings, weights: Path | None) -> Trained:
    """Everything of the run but the model. Raises ExportError if the run folder lacks a part."""
    from transformers import AutoTokenizer

    record = read_json(folder / "run.json")
    weights = weights or folder / ("adapter" if settings.lora.enabled else "model")
    try:
        rows = proof.read_rows(folder)
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=settings.model.trust_remote_code)
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"the run folder is not whole: {first_line(error)}") from error
    stop_ids = sorted(tokenizer.convert_tokens_to_ids(prompt_form(folder)[1]))
    prompts = [proof.prompt_of(row) for row in rows[: settings.export.num_prompts]]
    adds_bos = starts_with_bos(tokenizer)
    texts = [tokenizer.decode(ids[1:] if adds_bos and ids[:1] == [tokenizer.bos_token_id] else ids) for ids in prompts]
    questions = [row.question for row in rows[: settings.export.num_prompts]]
    tokens = verify.read_tokens(tokenizer, stop_ids, texts, questions)
    dtype = str((record.get("model") or {}).get("dtype", "torch.float32")).removeprefix("torch.")
    return Trained(folder, settings, record, weights, rows, tokenizer, stop_ids, texts, tokens, dtype)


# ------------------------------------------------------------------------------------------------ the formats


def _copy_adapter(trained: Trained) -> None:
    with durable.new_folder(trained.folder / "export" / "adapter", manifest=False) as work:
        keep = ("adapter_config.json", "adapter_model.safetensors")
        for name in keep:
            shutil.copy(trained.weights / name, work / name)
        trained.tokenizer.save_pretrained(work)


def _make_4bit(trained: Trained, report: dict, reference: proof.Measurement, merged: Path) -> None:
    place, begun = trained.folder / "export" / "merged_4bit", time.monotonic()
    if _attempt(report, "merged_4bit", lambda: merge.save_4bit(merged, place)):
        _list_folder(report, place)
        runtime.release_memory()
        limit = trained.settings.export.max_loss_increase
        _prove_folder(trained, report, reference, "merged_4bit", place, limit, begun)


def _make_gguf(
    trained: Trained, report: dict, reference: proof.Measurement, rounded: proof.Measurement | None, merged: Path
) -> None:
    """One file a type; f16 is made for all of them, and kept if it was asked for.

    `rounded` is what the merged 16-bit weights do in transformers, if that is known already.
    """
    wanted, place = trained.settings.export, trained.folder / "export" / "gguf"
    kinds = wanted.gguf.quantizations
    whole = place / ("model-f16.gguf" if "f16" in kinds else ".model-f16.gguf")
    if rounded is None and set(kinds) & set(gguf.HIGH_PRECISION):
        rounded = _answers_of(trained, merged)
    try:
        for kind in sorted(kinds, key=lambda k: k != "f16"):
            name, file, begun = f"gguf/{kind}", place / f"model-{kind}.gguf", time.monotonic()
            made = True
            if not whole.exists() or kind == "f16":
                made = _attempt(report, name, lambda: gguf.convert(merged, whole))
            if made and kind != "f16":
                if kind in gguf.HIGH_PRECISION:
                    made = _attempt(report, name, lambda k=kind, f=file: gguf.convert(merged, f, k))
                else:
                    made = _attempt(report, name, lambda k=kind, f=file: gguf.quantise(whole, f, k))
            if made:
                _list_gguf(report, file)
                _write_modelfile(trained, report, file)
                proving = functools.partial(_prove_gguf, trained, report, reference, rounded, name, file, kind, begun)
                _attempt(report, name, proving)
        if wanted.gguf.adapter:
            _make_gguf_adapter(trained, report, merged, whole)
    finally:
        if whole.name.startswith("."):
            whole.unlink(missing_ok=True)


def _write_modelfile(trained: Trained, report: dict, file: Path) -> None:
    """Put an Ollama Modelfile beside a GGUF file, or say why Ollama could not render the prompts of the training."""
    try:
        shape, stops = prompt_form(trained.folder)
        place = modelfile.write_modelfile(file.parent, file.name, trained.settings, shape, trained.tokenizer, stops)
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
        told = f"{layers} layers in the order of llama.cpp's own converter"
        _note(trained, report, "gguf/adapter", file, [verify.Check("tensors", True, told, told)], {}, begun)

    _attempt(report, "gguf/adapter", make)


def _attempt(report: dict, name: str, action: Callable[[], None]) -> bool:
    """Do one step of an artifact; what keeps it from being made is its status, and the others go on."""
    try:
        action()
    except Exception as error:  # safetensors, bitsandbytes and transformers each raise their own
        why = error.problems[0].why if isinstance(error, Refusal) else first_line(error)
        log.error("%s could not be made: %s", name, why)
        report["artifacts"][name] = {"status": "error", "error": why, "checks": [], "failed": ["made"]}
        return False
    return True


# ------------------------------------------------------------------------------------------------ the proof


def _measure_torch(model: Any, trained: Trained, wanted: ExportSettings) -> proof.Measurement:
    new = trained.settings.samples.max_new_tokens
    return proof.measure_torch(model, trained.rows, wanted.num_prompts, new, trained.stop_ids, trained.tokenizer.pad_token_id)


def _base_loss(model: Any, trained: Trained) -> float | None:
    """The loss of the model without its adapter, to tell how much of what was learnt an export keeps; None without one.

    Trained bias terms are written into the base itself, so that it cannot be had back.
    """
    if not hasattr(model, "disable_adapter") or trained.settings.lora.bias != Bias.none:
        return None
    with model.disable_adapter():
        return proof.row_losses(model, trained.rows)[0]


def _reference_facts(trained: Trained, reference: proof.Measurement, base_loss: float | None) -> dict[str, Any]:
    return {
        "loss": round(reference.loss, 6),
        "base_loss": base_loss and round(base_loss, 6),
        "rows": len(trained.rows),
        "prompts": len(reference.answers),
        "source": trained.rows[0].source,
        "eos_share": round(reference.eos_share, 4),
        "trained_loss": (trained.record.get("metrics") or {}).get("proof_loss"),
        "weights": os.path.relpath(trained.weights, trained.folder),
    }


def _anchor(trained: Trained, reference: proof.Measurement) -> tuple[list[verify.Check], dict[str, Any]]:
    """The saved weights, loaded afresh, against what the training itself measured with the model in its memory.

    A checkpoint has no such measurement, unless it is the one that was kept: its row says so.
    """
    in_memory = (trained.record.get("metrics") or {}).get("proof_loss")
    if trained.weights.parent != trained.folder or in_memory is None:
        return [], {
            "loss": round(reference.loss, 6),
            "eos_share": round(reference.eos_share, 4),
            "note": "not measured in training",
        }
    # Unsloth's kernels and transformers' round bfloat16 differently; in float32 they agree.
    allowed = 2 * verify.LOSSLESS[trained.dtype]
    checks = [
        verify.Check(
            "loss", abs(reference.loss - in_memory) <= allowed, f"{in_memory:.4f} ± {allowed:g}", f"{reference.loss:.4f}"
        )
    ]
    said = proof.Measurement(in_memory, [], _last_samples(trained), [])
    # Several prompts were answered at once, in other company: what rounding makes of a near tie is no difference.
    judged, answers = verify.compare_answers("answers", reference, said, verify.TIE[trained.dtype])
    if said.answers and trained.dtype == "float32":
        checks.append(judged)
    facts = {
        "loss": round(reference.loss, 6),
        "loss_increase": round(reference.loss - in_memory, 6),
        "limit": allowed,
        **answers,
        "eos_share": round(reference.eos_share, 4),
    }
    return checks, facts


def _last_samples(trained: Trained) -> list[list[int]]:
    """The answers to the first held-out rows that the kept weights gave at the end of the training, as token ids; none where
    the run was stopped before it gave them.
    """
    metrics, status = trained.record.get("metrics") or {}, trained.record.get("status")
    if status in ("stopped", "failed") and metrics.get("kept_step") != metrics.get("steps"):
        return []  # what was answered at its last step was answered by other weights
    lines = [line for line in read_lines(trained.folder / "samples.jsonl") if line.get("source") != "config"]
    last = {line.get("index"): line.get("completion_ids") for line in lines if line.get("step") == metrics.get("steps")}
    said = [last.get(index) for index in range(len(last))]
    return said if None not in said else []


def _prove_folder(
    trained, report, reference, name: str, place: Path, limit: float | None, begun: float
) -> proof.Measurement | None:
    """Load a model folder afresh, compare it, and note the result; returns what it does, None if it could not be measured."""
    measured = []

    def prove() -> None:
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trained.settings.model.trust_remote_code)
        ends = GenerationConfig.from_pretrained(place).eos_token_id
        questions = [row.question for row in trained.rows[: trained.settings.export.num_prompts]]
        checks = verify.compare_tokens(
            trained.tokens, verify.read_tokens(tokenizer, ends, trained.texts, questions), trained.tokenizer.bos_token_id
        )
        model = merge.load_merged(place, _torch_dtype(trained))
        ids = model.generation_config.eos_token_id
        found = proof.measure_torch(
            model, trained.rows, trained.settings.export.num_prompts, trained.settings.samples.max_new_tokens,
            ids if isinstance(ids, list) else [ids] if ids is not None else [], tokenizer.pad_token_id,
        )  # fmt: skip
        facts = {"peak_memory_gib": runtime.peak_memory_gib()}
        measured.append(found)
        del model
        runtime.release_memory()
        numbers, compared = verify.compare_numbers(reference, found, trained.dtype, limit)
        facts |= compared
        _note(trained, report, name, place, [*checks, *numbers], facts, begun)

    _attempt(report, name, prove)
    return measured[0] if measured else None


def _answers_of(trained: Trained, merged: Path) -> proof.Measurement | None:
    """What the merged 16-bit weights answer in transformers; None, with a warning, where it cannot load them."""
    rows, new = trained.rows[: trained.settings.export.num_prompts], trained.settings.samples.max_new_tokens
    try:
        model = merge.load_merged(merged, _torch_dtype(trained))
    except Exception as error:  # such as a model that needs code of its own
        log.warning("GGUF answers are not held against the merged weights, which did not load: %s", first_line(error))
        return None
    measured = proof.measure_torch(model, rows, len(rows), new, trained.stop_ids, trained.tokenizer.pad_token_id)
    del model
    runtime.release_memory()
    return measured


def _prove_gguf(trained, report, reference, rounded, name: str, file: Path, kind: str, begun: float) -> None:
    """Measure a GGUF file in llama.cpp and note the result.

    A lossless one holds the merged 16-bit weights, so that it is also held against these in transformers: between the two
    lies no rounding of weights, only llama.cpp's arithmetic.
    """
    wanted = trained.settings.export
    new = trained.settings.samples.max_new_tokens
    found = gguf.measure(file, trained.rows, wanted.num_prompts, new, trained.stop_ids, trained.texts)
    metadata, tokenizer = found["metadata"], trained.tokenizer
    names = {
        key: tokenizer.convert_ids_to_tokens(int(metadata[f"tokenizer.ggml.{key}_token_id"]))
        if f"tokenizer.ggml.{key}_token_id" in metadata
        else None
        for key in ("eos", "padding")
    }
    template = metadata.get("tokenizer.chat_template")
    held = verify.Tokens(names["eos"], names["padding"], sorted(found["ends"]), template, found["tokens"])
    held.chats = trained.tokens.chats if template == trained.tokens.chat_template else [template or ""]
    checks = verify.compare_tokens(trained.tokens, held, tokenizer.bos_token_id)
    limit = None if kind in gguf.HIGH_PRECISION else wanted.max_loss_increase
    # llama.cpp rounds what it multiplies f16 weights with to 16 bits, so that it is as exact as a 16-bit type of torch's.
    numbers, facts = verify.compare_numbers(reference, found["measurement"], "float16", limit)
    if limit is None and rounded is not None:
        tie = verify.TIE[trained.dtype]
        check, answers = verify.compare_answers("answers_of_merged", rounded, found["measurement"], tie)
        numbers.append(check)
        facts |= {"as_merged": answers["answers_equal"], "partings_from_merged": answers["partings"]}
    _note(trained, report, name, file, [*checks, *numbers], facts, begun)


def _note(
    trained: Trained, report: dict, name: str, place: Path, checks: list[verify.Check], facts: dict, begun: float
) -> None:
    """Add one artifact's result to the report and say it in a line."""
    failed = [check.name for check in checks if not check.ok]
    size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) if place.is_dir() else place.stat().st_size
    report["artifacts"][name] = {
        "status": "failed" if failed else "ok",
        "path": os.path.relpath(place, trained.folder),
        **facts,
        "size_bytes": size,
        "seconds": round(time.monotonic() - begun, 2),
        **_gain_kept(report, name, facts),
        "checks": [asdict(check) for check in checks],
        "failed": failed,
    }
    increase = f" ({facts['loss_increase']:+.4f})" if "loss_increase" in facts else ""
    same = f", {facts['answers_equal']} of {facts['answers']} answers the same" if facts.get("answers") else ""
    loss = f"  loss {facts['loss']:.4f}" if "loss" in facts else ""
    log.info("       %-13s %s%s%s%s", name, "FAILED" if failed else "ok    ", loss, increase, same)
    for check in checks:
        if not check.ok:
            log.error("%s %s: expected %s, found %s", name, check.name, check.expected, check.found)


def _gain_kept(report: dict, name: str, facts: dict) -> dict[str, float]:
    """How much of the fall in loss that the training brought is left in an export; says so where it is little.

    A small update can be lost in the rounding to 4 bits while the loss stays within `export.max_loss_increase`.
    """
    reference = report["reference"]
    gain = (reference.get("base_loss") or 0.0) - reference["loss"]
    if gain <= 0 or "loss_increase" not in facts:
        return {}
    kept = round(1 - facts["loss_increase"] / gain, 4)
    if kept < 0.5 and name != "adapter":
        log.warning("%s keeps %.0f %% of what the training brought: loss %.4f before it, %.4f after.", name, 100 * kept,
                    reference["base_loss"], reference["loss"])  # fmt: skip
    return {"gain_kept": kept}


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
                again = f"python scripts/export.py run={os.path.relpath(folder)} push=true export.hub.repo={repo}"
                again = with_word(again, settings)
                pushed[format] = {"error": str(error), "again": again}
                log.error("%s was not pushed: %s\nhint: %s", format, error, again)


def _source(trained: Trained) -> str:
    from sft import models

    return models.locate(trained.settings.model)[0]


def _has_tied_ends(trained: Trained) -> bool:
    """Whether the base's output layer and its embeddings are one weight."""
    from transformers import AutoConfig

    model = trained.settings.model
    config = AutoConfig.from_pretrained(_source(trained), revision=model.revision, trust_remote_code=model.trust_remote_code)
    return bool(config.get_text_config().tie_word_embeddings)


def _torch_dtype(trained: Trained) -> Any:
    import torch

    return getattr(torch, trained.dtype)
