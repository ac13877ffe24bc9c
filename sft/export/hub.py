"""The Hugging Face hub, or the server in HF_ENDPOINT: may we write there, and send one artifact folder.

Everything goes through the `huggingface_hub` client. Its own limits are mended here: it waits for a silent or busy server
without end, reads HF_ENDPOINT once at its import, and its messages may repeat what a server says about the token.
"""

import contextlib
import difflib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.errors import HubError, Problem, chain_of, first_line, is_page
from sft.sanitize import shown

log = logging.getLogger(__name__)

# Each format has a repository of its own: files of two formats on top of each other would be loaded as one model.
REPO_SUFFIX = {"merged_16bit": "", "adapter": "-LoRA", "merged_4bit": "-bnb-4bit", "gguf": "-GGUF"}

# transformers takes model.safetensors before the index, and other loaders every shard they see: a file of an earlier push
# with another number of shards would be loaded in place of the new weights, or beside them.
MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

WEIGHTS = {"merged_16bit": MODEL_WEIGHTS, "merged_4bit": MODEL_WEIGHTS}

CARD = "README.md"

NAMED = 10
"""How many of the files that are left out are named."""

CONNECT_SECONDS = 5.0

ANSWER_SECONDS = 15.0
"""Longest wait for the answer to a question; a server that is silent for longer is taken for dead."""

TRANSFER_SECONDS = 120.0
"""Longest silence within an upload; the server may have to put the parts of a large file together."""

CONFLICTS = 12
"""How often a server may say that it is busy with another operation."""


def repo_for(repo: str, format: str) -> str:
    """The repository of one format: `me/model` for the merged model, `me/model-GGUF` for GGUF files."""
    return repo + REPO_SUFFIX[format]


def endpoint() -> str:
    """The server: HF_ENDPOINT as it is now, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


# --------------------------------------------------------------------------------------------------- may we write


def check_access(repo: str, formats: list[str], private: bool, create: bool = True) -> list[Problem]:
    """Everything that would keep a push to the repositories of `formats` from working; creates those that are missing.

    `repo` is `export.hub.repo`, without a format's suffix. Nothing is created while there is a problem, or with
    `create=False`. A repository that is there is asked for write permission without writing to it, and stays as it is: a
    public one is a problem where a private one was asked for (the weights would be published), a private one where a public
    was asked for only a warning (nothing gets out, and making it public is its owner's step).
    """
    what = f"export.hub.repo={repo}"
    elsewhere = "export.hub.repo=null   to export without a push; it can be pushed later"
    try:
        token = _find_token()
    except Exception as error:  # a refresh of the login that failed; the reason is all that matters
        return [Problem(what, f"The login cannot be used: {_reason(error)}", f"hf auth login\n{elsewhere}")]
    login = f"hf auth login\nexport HF_TOKEN=...   with a token that may write: {_shown_endpoint()}/settings/tokens"
    if not token:
        return [Problem(what, "There is no token for the hub: HF_TOKEN is not set and nobody is logged in.", login)]
    with _client(ANSWER_SECONDS):
        api = _api(token)
        try:
            user = api.whoami()
        except Exception as error:
            if _status(error) == 401:
                where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"
                return [Problem(where, f"{_shown_endpoint()} does not accept this token.", login)]
            fix = f"check the network and HF_ENDPOINT (now {_shown_endpoint()}), then try again\n{elsewhere}"
            return [Problem(what, f"The hub cannot be asked: {_reason(error, token)}", fix)]
        problems = _check_user(user, repo)
        if problems:
            return problems
        missing = []
        for target in dict.fromkeys(repo_for(repo, format) for format in formats):
            found = _check_existing(api, target, private, token)
            if found is None:
                missing.append(target)
            else:
                problems += found
        if create and not problems:
            problems = [p for target in missing for p in _create(api, target, private, token)]
    return problems


def _check_user(user: dict, repo: str) -> list[Problem]:
    """The problems that the answer to "who am I" shows: a token that only reads, a name that is somebody else's."""
    problems, what = [], f"export.hub.repo={repo}"
    owner, name = repo.split("/")
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        fix = f"make one of the type write at {_shown_endpoint()}/settings/tokens, then: hf auth login"
        problems.append(Problem("HF_TOKEN or the saved login", "This token may only read.", fix))
    roles = {str(org.get("name")): org.get("roleInOrg") for org in user.get("orgs") or []}
    own = str(user.get("name"))
    if owner not in (own, *roles):
        spellings = {name.lower(): name for name in (own, *roles)}
        close = difflib.get_close_matches(owner.lower(), spellings, 1, 0.6)
        better = spellings[close[0]] if close else own
        why = f"{owner} is neither your user name ({own}) nor an organisation of yours"
        why += f" ({', '.join(sorted(roles))})." if roles else "."
        problems.append(Problem(what, why, f"export.hub.repo={better}/{name}"))
    elif owner != own and roles[owner] == "read":
        why = f"You may only read in the organisation {owner}."
        problems.append(Problem(what, why, f"export.hub.repo={own}/{name}\nor ask an owner of {owner} for the role write"))
    return problems


def _check_existing(api: Any, target: str, private: bool, token: str) -> list[Problem] | None:
    """The problems of a repository that is there; None where it is not."""
    from huggingface_hub.errors import RepositoryNotFoundError

    what, renamed = f"export.hub.repo: {target}", "export.hub.repo=<user>/<another name>"
    try:
        info = api.model_info(target, timeout=ANSWER_SECONDS)
    except RepositoryNotFoundError:
        return None
    except Exception as error:
        return [Problem(what, f"It cannot be looked up: {_reason(error, token)}", renamed)]
    if private and info.private is False:
        why = "This repository is public, and export.hub.private=true asks for a private one."
        fix = f"export.hub.private=false   to publish\nhf repos settings {target} --private   to hide it\n{renamed}"
        return [Problem(what, why, fix)]
    if not private and info.private:
        log.warning("%s stays private, as it is: hf repos settings %s --public   opens it.", target, target)
    try:
        api.auth_check(target, write=True)
    except Exception as error:
        if _status(error) in (401, 403) or isinstance(error, RepositoryNotFoundError):
            why = f"This token may not write to it: {_reason(error, token)}"
            fix = f"give the token write permission for it at {_shown_endpoint()}/settings/tokens\n{renamed}"
            return [Problem(what, why, fix)]
        if _status(error) == 404:  # a server that does not know the question yet
            log.warning("%s cannot say beforehand whether it may be written to.", target)
            return []
        return [Problem(what, f"Its permissions cannot be asked: {_reason(error, token)}", renamed)]
    return []


def _create(api: Any, target: str, private: bool, token: str) -> list[Problem]:
    try:
        api.create_repo(target, private=private, exist_ok=True)
    except Exception as error:
        fix = f"give the token write permission at {_shown_endpoint()}/settings/tokens\nexport.hub.repo=<user>/<another name>"
        return [Problem(f"export.hub.repo: {target}", f"It cannot be created: {_reason(error, token)}", fix)]
    return []


# ----------------------------------------------------------------------------------------------------------- send


def push(folder: Path, repo: str, format: str, private: bool, written: list[str] | None = None) -> str:
    """Send the files of `folder` to the repository of `format`, all in one commit, and return the repository's address.

    `repo` is `export.hub.repo`, without the suffix; `written` names the files that the export wrote, the only ones sent beside
    the card. Without it all are. Readers see all of the files or none. What the server has already,
    committed or left from a push that failed, is not sent again. Nothing is deleted but weights of an earlier push that
    would be loaded in place of these. Hidden files stay here, and links are refused. Raises HubError with the
    reason in one line.
    """
    target, token = repo_for(repo, format), None
    try:
        token = _find_token()
        if not token:
            raise HubError("there is no token: hf auth login, or set HF_TOKEN")
        files = _files_of(folder, written)
        if not files:
            raise HubError(f"the folder {folder.name} holds no files")
        _refuse_local_base(folder / "adapter_config.json")
        with _client(ANSWER_SECONDS):
            _find_or_create(_api(token), target, private)
        with _client(TRANSFER_SECONDS):
            _commit(_api(token), target, files, format)
    except Exception as error:  # the client raises its own, httpx's and Python's errors; `from None`: they may quote a token
        raise HubError(f"{target}: {_reason(error, token)}") from None
    return f"{_shown_endpoint()}/{target}"


def _refuse_local_base(config: Path) -> None:
    """PEFT notes where the base was loaded from; a folder of this machine would be published and load nowhere else."""
    if config.is_file():
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if isinstance(base, str) and (Path(base).is_absolute() or base.startswith("~")):
            raise HubError(
                "adapter_config.json names a folder of this machine as its base model; write the base's hub id there as "
                f"base_model_name_or_path (it is the folder {Path(base).name} now); nothing was sent"
            )


def _find_or_create(api: Any, target: str, private: bool) -> None:
    """See that the repository is there and no more public than asked: it may have changed since the check."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(target, timeout=ANSWER_SECONDS)
    except RepositoryNotFoundError:
        api.create_repo(target, private=private, exist_ok=True)
        return
    if private and info.private is False:
        raise HubError("it is public, and export.hub.private=true asks for a private one; nothing was sent")


def _commit(api: Any, target: str, files: dict[str, Path], format: str) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    pattern = WEIGHTS.get(format)
    stale = []
    if pattern and any(pattern.fullmatch(name) for name in files):
        stale = [name for name in api.list_repo_files(target) if pattern.fullmatch(name) and name not in files]
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
    if stale:
        log.info("%s: weights of an earlier push are removed: %s", target, ", ".join(stale))
    api.create_commit(target, [*additions, *deletions], commit_message=f"Upload {format}")
    ignored = [a.path_in_repo for a in additions if getattr(a, "_should_ignore", False)]
    if ignored:
        raise HubError(f"its .gitignore keeps out {', '.join(ignored)}")


def _files_of(folder: Path, written: list[str] | None) -> dict[str, Path]:
    """The plain files of a folder by their names in the repository, without hidden ones and what lies in hidden folders.

    With `written` only these and the card; a name in it that leads out of the folder is the name of none. Raises HubError for
    links: an export makes none, and what they point to is no part of it.
    """
    if folder.is_symlink():
        raise HubError(f"{folder.name} is a link, which is not followed; nothing was sent")
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*"))}
    found = {name: path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)}
    if links := [name.as_posix() for name, path in found.items() if path.is_symlink()]:
        raise HubError(f"it holds links, which are not followed; remove {', '.join(links)}; nothing was sent")
    files = {name.as_posix(): path for name, path in found.items() if path.is_file()}
    if written is None:
        log.info("       %s/ has no list of what the export wrote: every file in it is sent.", folder.name)
        return files
    if others := [name for name in files if name not in written and name != CARD]:
        named = ", ".join(map(shown, others[:NAMED])) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
        log.warning("%s/: %d files that the export did not write are not sent: %s", folder.name, len(others), named)
    return {name: path for name, path in files.items() if name not in others}


# ------------------------------------------------------------------------------------------------------ the client


def _find_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _api(token: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token)


@contextlib.contextmanager
def _client(silence: float) -> Iterator[None]:
    """Let the client give up on a server that says nothing for `silence` seconds, or nothing but that it is busy."""
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY  # there is no public way to ask; one that somebody else has set is kept
    conflicts = 0

    def end_conflicts(response: Any) -> None:
        nonlocal conflicts
        if response.status_code == 409:  # create_repo repeats a 409 without a pause and without end
            conflicts += 1
            if conflicts > CONFLICTS:
                raise HubError("the server goes on answering 409 (another operation is in progress)")
            time.sleep(0.1 * (conflicts - 1))

    def make_client() -> Any:
        client = before()
        client.timeout = httpx.Timeout(silence, connect=CONNECT_SECONDS)
        client.event_hooks["response"].append(end_conflicts)
        return client

    set_client_factory(make_client)
    try:
        yield
    finally:
        set_client_factory(before)


def _status(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with, if it answered."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e.response.status_code for e in chain_of(error) if isinstance(e, HfHubHTTPError)), None)


def _reason(error: BaseException, token: str | None = None) -> str:
    """Why a call failed, in one line that is safe to print: no token, no signed address, no control characters."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = chain_of(error)
    answer = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    network = next((e for e in chain if isinstance(e, httpx.TransportError)), None)
    if isinstance(error, HubError):
        text = str(error)
    elif any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        text = "the hub is switched off: HF_HUB_OFFLINE is set, or it could not be reached when this program started"
    elif answer is not None:
        reason = (answer.server_message or answer.response.reason_phrase or "").strip()
        text = f"the server answered {answer.response.status_code}" + (f" ({reason.splitlines()[0]})" if reason else "")
        text = f"{first_line(error)} {text}" if error is not answer else text  # it names the file
    elif isinstance(network, httpx.TimeoutException):
        text = f"{_shown_endpoint()} does not answer"
    elif network is not None:
        text = f"no connection to {_shown_endpoint()}: {first_line(network)}"
    elif is_page(error):
        text = f"{_shown_endpoint()} answered with a page that is not the hub's (a proxy or a login page?)"
    else:
        root = chain[-1]
        text = f"{type(error).__name__}: {first_line(error)}"
        text += f" (because of {type(root).__name__}: {first_line(root)})" if root is not error else ""
        if "xet-write-token" in text:
            text = f"{_shown_endpoint()} does not speak the Xet protocol: set HF_HUB_DISABLE_XET=1 and push again"
    return _without_secrets(text, token)


def _without_secrets(text: str, token: str | None) -> str:
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1", re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", text))
    return "".join(c if c.isprintable() else " " for c in text)[:400]


def _shown_endpoint() -> str:
    """The server's address without a name and password that may stand in it."""
    return _without_secrets(endpoint(), None)
