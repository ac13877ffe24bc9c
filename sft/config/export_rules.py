"""Rules for exports: their formats, and the repository they are pushed to."""

import difflib
import re

from sft.config.schema import GgufSettings, Settings
from sft.config.upstream import NEED_MATRIX, gguf_types
from sft.errors import Problem

HUB_NAME_LENGTH = 96 - len("-bnb-4bit")  # of a repository, before the longest suffix of sft/export/hub.py


def check_export(settings: Settings) -> list[Problem]:
    """Formats that there are none of, and what would be ignored."""
    export, problems = settings.export, []
    named = export.gguf.quantizations if export.gguf.quantizations != GgufSettings().quantizations else []
    for key, values, known in (
        ("export.formats", export.formats, ["adapter", "merged_16bit", "merged_4bit", "gguf"]),
        ("export.gguf.quantizations", named, gguf_types() if named else []),
    ):
        for value in values:
            if known and value not in known:
                close, why = difflib.get_close_matches(value.lower(), known, 1, 0.4), ""
                if value.lower() in NEED_MATRIX:
                    close = ["iq3_s" if value.lower().startswith("iq3") else "q2_k"]
                    why = "llama.cpp makes it with an importance matrix alone, which nothing here computes. "
                better = dict.fromkeys([close[0] if v == value else v for v in values] if close else [known[0]])
                why += f"It can be: {', '.join(known)}."
                problems.append(Problem(f"{key}: {value}", why, f"{key}=[{','.join(better)}]"))
    if export.gguf.adapter and "gguf" not in export.formats:
        problems.append(
            Problem("export.gguf.adapter=true", "No GGUF files are asked for, so it would be ignored.", "export=gguf")
        )
    if export.gguf.adapter and not settings.lora.enabled:
        why = "Full fine-tuning has no adapter."
        problems.append(Problem("lora=none export.gguf.adapter=true", why, "export.gguf.adapter=false"))
    if "gguf" in export.formats and not export.gguf.quantizations and not export.gguf.adapter:
        problems.append(Problem("export.gguf.quantizations=[]", "No GGUF type is named.", "export.gguf.quantizations=[q8_0]"))
    if "adapter" in export.formats and not settings.lora.enabled:
        problems.append(Problem("lora=none export.formats: adapter", "Full fine-tuning has no adapter.", "export=merged_16bit"))
    if export.hub.repo and not export.formats:
        why = "Nothing is exported, so nothing would be pushed."
        problems.append(Problem(f"export.hub.repo={export.hub.repo}", why, "export=adapter   or   export=merged_16bit"))
    return [*problems, *_check_hub_repo(export.hub.repo)]


def _check_hub_repo(repo: str | None) -> list[Problem]:
    """The form of `user/name`, by the hub's rules (huggingface_hub/utils/_validators.py), with room for a format's suffix."""
    if repo is None:
        return []
    if not repo.strip():
        return [Problem("export.hub.repo=", "The value is empty.", "export.hub.repo=null   for none")]
    what = f"export.hub.repo={repo}"
    parts = re.sub(r"^(https?://[^/]+/|hf://)?(models/)?", "", repo.strip()).strip("/").split("/")
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9_.-]+", "-", parts[-1]))).removesuffix(".git")
    name = name.strip("-.")[:HUB_NAME_LENGTH].strip("-.") or "my-model"
    if len(parts) == 1:
        why = "It names no owner. Did you mean a repository under your user name, or that of an organisation?"
        return [Problem(what, why, f"export.hub.repo=<user>/{name}   (hf auth whoami shows your user name)")]
    fix = f"export.hub.repo={re.sub(r'[^A-Za-z0-9_.-]+', '-', parts[0]).strip('-.') or '<user>'}/{name}"
    if repo != "/".join(parts) or len(parts) > 2:
        return [Problem(what, "It has to be the owner and the name with one slash between them.", fix)]
    if not all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", part) for part in parts):
        why = "The hub allows letters, digits, - _ and . in a name, and neither - nor . at its ends."
    elif "--" in repo or ".." in repo:
        why = "The hub allows neither -- nor .. in a name."
    elif repo.endswith(".git"):
        why = "A name on the hub cannot end in .git."
    elif len(parts[1]) > HUB_NAME_LENGTH or len(parts[0]) > 96:
        why = f"The name is too long: the hub takes 96 characters, and a format may add 9, which leaves {HUB_NAME_LENGTH}."
    else:
        return []
    return [Problem(what, why, fix)]
