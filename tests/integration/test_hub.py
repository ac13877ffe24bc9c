"""Pushes to a loopback hub through the real huggingface_hub client: permissions, failures, and what lies there after."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import huggingface_hub
import pytest

from sft.errors import HubError
from sft.export import hub as export_hub
from sft.export.hub import check_access, push, repo_for
from tests.conftest import ROOT, SMALL, make_settings
from tests.hub_server import TOKEN, HubServer, Repo

FORMATS = ["merged_16bit", "adapter", "merged_4bit", "gguf"]
OTHER = "eyJ.AnOrganisationsOwnToken-0123"
CARD = "---\nlicense: apache-2.0\ntags:\n- lora\n---\n# A model\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub, with the client pointed at it; retries do not wait."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "login" / "token"))
    monkeypatch.setattr(_http, "time", type("Clock", (), {"sleep": staticmethod(lambda s: None), "time": time.time}))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
        _http.close_session()


def make_folder(place: Path, **files: str | bytes) -> Path:
    """A folder with these files; `__` in a name stands for the dot."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = place / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


@pytest.fixture
def merged(tmp_path):
    """A folder as the merged export leaves it, with three shards."""
    shards = {f"model-0000{n}-of-00003__safetensors": bytes([n]) * 5000 for n in (1, 2, 3)}
    files = {"config__json": "{}", "README__md": CARD, "model__safetensors__index__json": '{"weight_map": {}}'}
    return make_folder(tmp_path / "run" / "export" / "merged_16bit", **files, **shards)


def problem(problems):
    assert len(problems) == 1, problems
    assert problems[0].why and problems[0].fix
    return problems[0]


# ------------------------------------------------------------------------------------------------ may we write


def test_every_format_has_a_repository_of_its_own():
    assert [repo_for("me/model", f) for f in FORMATS] == ["me/model", "me/model-LoRA", "me/model-bnb-4bit", "me/model-GGUF"]


@pytest.mark.parametrize("private", [True, False])
def test_repositories_are_created_as_private_as_asked(hub, private):
    assert check_access("me/model", FORMATS, private) == []
    assert {name: repo.private for name, repo in hub.repos.items()} == {repo_for("me/model", f): private for f in FORMATS}


def test_an_existing_repository_is_asked_without_writing_to_it(hub):
    hub.repos["me/model"] = Repo(private=True)
    assert check_access("me/model", ["merged_16bit"], True) == []
    assert hub.asked("GET /api/models/me/model/auth-check/write")
    assert [r for r in hub.requests if not r.startswith("GET")] == [] and len(hub.repos["me/model"].commits) == 1


def test_a_server_that_cannot_be_asked_for_permission_is_no_problem(hub, caplog):
    hub.repos["me/model"] = Repo(private=True)
    hub.without_auth_check = True
    assert check_access("me/model", ["merged_16bit"], True) == []
    assert "cannot say beforehand" in caplog.text


def test_no_token_at_all(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    found = problem(check_access("me/model", ["adapter"], True))
    assert "no token" in found.why and "hf auth login" in found.fix and "HF_TOKEN" in found.fix
    assert hub.requests == []


def test_the_login_file_is_enough(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    login = Path(huggingface_hub.constants.HF_TOKEN_PATH)
    login.parent.mkdir()
    login.write_text(TOKEN + "\n")
    assert check_access("me/model", ["adapter"], True) == [] and "me/model-LoRA" in hub.repos


def test_a_wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "WrongTokenWrongToken")
    found = problem(check_access("me/model", FORMATS, True))
    assert found.what == "HF_TOKEN" and "does not accept" in found.why and "hf auth login" in found.fix
    assert hub.repos == {}


def test_a_token_that_only_reads(hub):
    hub.user["auth"]["accessToken"]["role"] = "read"
    found = problem(check_access("me/model", FORMATS, True))
    assert "only read" in found.why and hub.url in found.fix and hub.repos == {}


def test_somebody_elses_name_and_the_one_that_was_meant(hub):
    hub.user["orgs"] = [{"name": "our-lab", "roleInOrg": "write"}]
    found = problem(check_access("our-lap/model", FORMATS, True))
    assert "me" in found.why and "our-lab" in found.why and found.fix == "export.hub.repo=our-lab/model"
    assert problem(check_access("stranger/model", FORMATS, True)).fix == "export.hub.repo=me/model"
    assert hub.repos == {}


def test_an_organisation_one_may_write_to_and_one_may_not(hub):
    hub.user["orgs"] = [{"name": "our-lab", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}]
    assert check_access("our-lab/model", ["gguf"], True) == []
    assert problem(check_access("Our-Lab/model", ["gguf"], True)).fix == "export.hub.repo=our-lab/model"
    assert "only read in the organisation library" in problem(check_access("library/model", ["gguf"], True)).why


def test_problems_of_all_repositories_come_together_and_nothing_is_created(hub):
    hub.repos["me/model"] = Repo(private=False)
    hub.repos["me/model-LoRA"] = Repo(private=True)
    hub.forbidden = {"me/model-LoRA"}
    public, forbidden = check_access("me/model", FORMATS, True)
    assert "is public" in public.why and "export.hub.private=false" in public.fix
    assert "may not write" in forbidden.why and "403" in forbidden.why
    assert set(hub.repos) == {"me/model", "me/model-LoRA"}


def test_a_private_repository_stays_private_with_a_warning(hub, caplog):
    hub.repos["me/model"] = Repo(private=True)
    assert check_access("me/model", ["merged_16bit"], False) == []
    assert "stays private" in caplog.text and hub.repos["me/model"].private


def test_no_right_to_create(hub):
    hub.forbid_create = True
    found = problem(check_access("me/model", ["gguf"], True))
    assert "cannot be created" in found.why and "rights" in found.why


def test_a_busy_server_is_asked_again_but_not_for_ever(hub, monkeypatch):
    hub.busy = 3
    assert check_access("me/model", ["gguf"], True) == [] and len(hub.asked("repos/create")) == 4
    monkeypatch.setattr(export_hub, "CONFLICTS", 4)
    hub.busy = 1000
    found = problem(check_access("me/other", ["gguf"], True))
    assert "409" in found.why and len(hub.asked("repos/create")) == 4 + 5


@pytest.mark.parametrize("ending", ["refused", "silent"])
def test_a_dead_server_is_told_within_seconds(hub, monkeypatch, merged, ending):
    monkeypatch.setattr(export_hub, "ANSWER_SECONDS", 0.5)
    if ending == "refused":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.delay = 3
    start = time.monotonic()
    found = problem(check_access("me/model", ["merged_16bit"], True))
    with pytest.raises(HubError) as error:
        push(merged, "me/model", "merged_16bit", True)
    assert time.monotonic() - start < 3
    word = "no connection to" if ending == "refused" else "does not answer"
    assert word in found.why and "HF_ENDPOINT" in found.fix and word in str(error.value)


def test_a_client_that_is_switched_off_says_so(hub, monkeypatch, merged):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in problem(check_access("me/model", ["adapter"], True)).why
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(merged, "me/model", "merged_16bit", True)


# ------------------------------------------------------------------------------------------------------- send


def test_a_push_puts_every_file_there_and_no_hidden_one(hub, merged):
    make_folder(merged, __work="x", __cache__json="x")
    make_folder(merged / ".tmp", half__safetensors="x")
    make_folder(merged / "sub", notes__txt="kept")
    assert push(merged, "me/model", "merged_16bit", True) == f"{hub.url}/me/model"
    repo = hub.repos["me/model"]
    expected = {p.relative_to(merged).as_posix(): p.read_bytes() for p in merged.rglob("*") if p.is_file()}
    expected = {name: content for name, content in expected.items() if not name.startswith(".")}
    assert {n: c for n, c in repo.files.items() if n != ".gitattributes"} == expected and "sub/notes.txt" in expected
    assert repo.private and len(repo.lfs) == 3 and len(repo.commits) == 2


@pytest.mark.parametrize("made", ["file", "folder", "itself"])
def test_a_link_in_an_export_is_named_and_not_followed(hub, tmp_path, made):
    secret = make_folder(tmp_path / "ssh", id_rsa="PRIVATE")
    place = make_folder(tmp_path / "export" / "adapter", config__json="{}")
    if made == "itself":
        shutil.rmtree(place)
    links = {
        "file": (place / "notes.txt", secret / "id_rsa"),
        "folder": (place / "notes.txt", secret),
        "itself": (place, secret),
    }
    os.symlink(links[made][1], links[made][0])
    with pytest.raises(HubError, match="adapter is a link" if made == "itself" else "links.*notes.txt"):
        push(place, "me/model", "adapter", True)
    assert hub.repos == {}


def test_a_push_sends_what_the_export_wrote_and_names_the_rest(hub, merged, tmp_path, caplog):
    written = [p.name for p in merged.iterdir() if p.name != "README.md"]
    make_folder(merged, notes__txt="mine")
    make_folder(merged / "sub", id_rsa="PRIVATE")
    make_folder(tmp_path / "run", secret="PRIVATE")
    push(merged, "me/model", "merged_16bit", True, [*written, "../../secret", str(tmp_path / "run" / "secret")])
    assert set(hub.repos["me/model"].files) - {".gitattributes"} == {*written, "README.md"}
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "2 files" in warning and "notes.txt, sub/id_rsa" in warning


def test_an_export_without_a_list_is_pushed_whole_and_says_so(hub, merged, caplog):
    caplog.set_level(logging.INFO)
    make_folder(merged, notes__txt="kept")
    push(merged, "me/model", "merged_16bit", True)
    assert "notes.txt" in hub.repos["me/model"].files and caplog.text.count("every file in it is sent") == 1


LISTED = ["adapter_config.json", "adapter_model.safetensors", "../../run.json", 7]


@pytest.mark.parametrize("files", [{"adapter": LISTED}, [], 5])
def test_the_list_in_verify_json_names_files_of_the_export_alone(hub, tmp_path, files):
    from sft.export.exporter import _describe_and_push, _earlier_files
    from sft.storage.jsonio import jsonable

    run, settings = tmp_path / "run", make_settings(*SMALL, "export=adapter", "export.hub.repo=me/demo")
    make_folder(run / "export" / "adapter", adapter_config__json="{}", adapter_model__safetensors="weights", notes__txt="x")
    (run / "run.json").write_text(json.dumps({"status": "finished", "settings": jsonable(settings)}))
    report = {"artifacts": {"adapter": {"status": "ok", "path": "adapter"}}, "files": files}
    (run / "export" / "verify.json").write_text(json.dumps(report))
    _describe_and_push(run, settings, report)
    sent = set(hub.repos["me/demo-LoRA"].files) - {".gitattributes"}
    assert sent - {"notes.txt"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert ("notes.txt" in sent) == (not isinstance(files, dict))
    assert set(_earlier_files(run)) == set(files if isinstance(files, dict) else ())


def test_the_hint_after_a_failed_push_pushes_what_is_on_disk(hub, tmp_path):
    from sft.cli import export
    from sft.storage.jsonio import jsonable

    run = tmp_path / "run"
    make_folder(run / "adapter", adapter_config__json="{}")
    make_folder(run / "export" / "adapter", adapter_config__json="{}", adapter_model__safetensors="weights")
    (run / "run.json").write_text(json.dumps({"status": "finished", "settings": jsonable(make_settings(*SMALL))}))
    (run / "export" / "verify.json").write_text(json.dumps({"artifacts": {"adapter": {"status": "ok", "path": "adapter"}}}))
    assert export.main([f"run={run}", "push=true", "export.hub.repo=me/demo"]) == 0
    assert hub.repos["me/demo-LoRA"].files["adapter_model.safetensors"] == b"weights"


def test_large_files_go_in_parts_where_the_server_asks_for_it(hub, tmp_path):
    hub.part_size = 1000
    content = os.urandom(4321)
    folder = make_folder(tmp_path / "gguf", f16__gguf=content, Modelfile="FROM f16.gguf")
    assert push(folder, "me/model", "gguf", True) == f"{hub.url}/me/model-GGUF"
    assert hub.repos["me/model-GGUF"].files["f16.gguf"] == content and len(hub.asked("/part/")) == 5


def test_several_formats_go_to_several_repositories(hub, tmp_path):
    for format in FORMATS:
        push(make_folder(tmp_path / format, config__json=format), "me/model", format, False)
    found = {name: repo.files["config.json"].decode() for name, repo in hub.repos.items()}
    assert found == {repo_for("me/model", f): f for f in FORMATS}


def test_a_second_push_sends_nothing(hub, merged):
    push(merged, "me/model", "merged_16bit", True)
    sent, commits = list(hub.uploads), list(hub.repos["me/model"].commits)
    push(merged, "me/model", "merged_16bit", True)
    assert hub.uploads == sent and hub.repos["me/model"].commits == commits


@pytest.mark.parametrize("status", [500, 403])
def test_after_a_failure_half_way_the_next_push_sends_only_what_is_missing(hub, merged, monkeypatch, status):
    monkeypatch.setattr(hub, "fail_blob", 2)
    hub.fail_for_good, hub.fail_status = True, status
    with pytest.raises(HubError) as error:
        push(merged, "me/model", "merged_16bit", True)
    message = str(error.value)
    assert message.startswith("me/model: ") and str(status) in message and "out of order" in message and "\n" not in message
    assert "safetensors" in message and len(hub.asked("/blobs/")) <= 2 + 6, "bounded retries"
    before = list(hub.uploads)
    assert len(before) == 2 and list(hub.repos["me/model"].files) == [".gitattributes"], "readers see all or nothing"
    hub.fail_blob, hub._failing = None, None
    push(merged, "me/model", "merged_16bit", True)
    assert len(hub.uploads) == 3 and len(set(hub.uploads)) == 3
    assert len([n for n in hub.repos["me/model"].files if n.endswith(".safetensors")]) == 3


def test_a_storage_that_stumbles_once_is_asked_again(hub, merged):
    hub.fail_blob = 2
    push(merged, "me/model", "merged_16bit", True)
    assert len(hub.uploads) == 3 and hub._failing is None


def test_a_commit_that_fails_can_be_tried_again_without_sending(hub, merged):
    hub.fail_commit = True
    with pytest.raises(HubError, match="500"):
        push(merged, "me/model", "merged_16bit", True)
    hub.fail_commit = False
    push(merged, "me/model", "merged_16bit", True)
    assert len(hub.uploads) == 3 and "config.json" in hub.repos["me/model"].files


def test_weights_of_an_earlier_push_go_and_everything_else_stays(hub, merged, tmp_path):
    push(merged, "me/model", "merged_16bit", True)
    repo = hub.repos["me/model"]
    repo.files |= {"notes.md": b"mine", "pictures/model.safetensors": b"mine", "other.safetensors": b"mine"}
    single = make_folder(tmp_path / "single", config__json="{}", model__safetensors=b"9" * 5000)
    push(single, "me/model", "merged_16bit", True)
    expected = {"README.md", "config.json", "model.safetensors", "notes.md", "pictures/model.safetensors", "other.safetensors"}
    assert set(repo.files) == expected | {".gitattributes"}
    push(make_folder(tmp_path / "card", README__md=CARD), "me/model", "merged_16bit", True)
    assert "model.safetensors" in repo.files, "a push without weights takes none away"


def test_gguf_files_of_an_earlier_push_stay(hub, tmp_path):
    push(make_folder(tmp_path / "a", q8_0__gguf="8"), "me/model", "gguf", True)
    push(make_folder(tmp_path / "b", q4_k_m__gguf="4"), "me/model", "gguf", True)
    assert {"q8_0.gguf", "q4_k_m.gguf"} <= set(hub.repos["me/model-GGUF"].files)


def test_nothing_is_sent_to_a_public_repository_where_a_private_one_was_asked_for(hub, merged):
    hub.repos["me/model"] = Repo(private=False)
    with pytest.raises(HubError, match="public"):
        push(merged, "me/model", "merged_16bit", True)
    assert hub.uploads == [] and len(hub.repos["me/model"].commits) == 1


def test_a_card_that_the_hub_refuses_is_told_before_anything_is_sent(hub, merged):
    (merged / "README.md").write_text("---\nlicense: [1, 2\n---\n")
    with pytest.raises(HubError, match=r"README\.md"):
        push(merged, "me/model", "merged_16bit", True)
    assert hub.uploads == []


def test_files_that_the_repository_ignores_are_named(hub, merged):
    hub.repos["me/model"] = Repo(private=True)
    hub.repos["me/model"].files[".gitignore"] = b"config.json\n"
    with pytest.raises(HubError, match=r"gitignore keeps out config\.json"):
        push(merged, "me/model", "merged_16bit", True)


def test_an_adapter_that_names_a_folder_of_this_machine_is_not_sent(hub, tmp_path):
    config = json.dumps({"base_model_name_or_path": "/home/somebody/models/base"})
    folder = make_folder(tmp_path / "adapter", adapter_config__json=config, adapter_model__safetensors="x")
    with pytest.raises(HubError, match="hub id") as error:
        push(folder, "me/model", "adapter", True)
    assert "somebody" not in str(error.value) and hub.requests == []


def test_a_server_without_xet_says_what_to_set(hub, merged, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        push(merged, "me/model", "merged_16bit", True)


def test_a_push_without_permission_token_or_files(hub, merged, tmp_path, monkeypatch):
    hub.repos["me/model"] = Repo(private=True)
    hub.forbidden = {"me/model"}
    with pytest.raises(HubError, match="403"):
        push(merged, "me/model", "merged_16bit", True)
    assert len(hub.requests) < 8, "a refusal is final"
    with pytest.raises(HubError, match="holds no files"):
        push(make_folder(tmp_path / "empty"), "me/model", "merged_16bit", True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token"):
        push(merged, "me/model", "merged_16bit", True)


# ---------------------------------------------------------------------------------------------- the token, the client


def test_the_token_is_nowhere(hub, merged, tmp_path, caplog, capfd, monkeypatch):
    """With talkative logs and a server that repeats what it was sent. (httpcore's DEBUG lines would show such answers raw.)"""
    caplog.set_level(logging.INFO)
    for name in ("huggingface_hub", "httpx"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.DEBUG, logger=name)
    others = [("adapter", f"{TOKEN} x\ty"), ("adapter", OTHER)]  # one that is no header's value, one of another form
    texts = []
    hub.echo_token = True
    hub.repos["me/model-LoRA"] = Repo(private=True)
    hub.forbidden = {"me/model-LoRA"}
    hub.forbid_create = True
    texts += [str(p) for p in check_access("me/model", ["adapter"], True) + check_access("me/model", ["gguf"], True)]
    hub.forbid_create, hub.fail_blob, hub.fail_for_good = False, 1, True
    for format, token in (("merged_16bit", TOKEN), ("adapter", TOKEN), ("adapter", TOKEN[:-1]), *others):
        monkeypatch.setenv("HF_TOKEN", token)
        texts += [str(p) for p in check_access("me/model", [format], True)]
        try:
            push(merged, "me/model", format, True)
        except HubError as error:
            texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert len(texts) >= 14 and any("***" in text for text in texts)
    out, err = capfd.readouterr()
    texts += [out, err, *(record.getMessage() for record in caplog.records)]
    texts += [p.read_bytes().decode(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert any("whoami-v2" in text for text in texts), "the logs were on"
    assert [text for text in texts if TOKEN[:-1] in text or OTHER in text] == []
    assert [text for text in texts if "X-Amz-Signature" in text and "HubError" in text] == []


def test_the_users_own_client_settings_come_back(hub):
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    check_access("me/model", ["adapter"], True)
    assert _http._GLOBAL_CLIENT_FACTORY is before and huggingface_hub.get_session().timeout.read is None


def test_a_password_in_the_address_is_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:geheim@127.0.0.1:9/")
    assert "geheim" not in str(check_access("me/model", ["adapter"], True))


SHAPES = {"A": (4, 64), "B": (64, 4)}  # of an adapter of rank 4 on the tiny model
USE_CARDS = """
import json, re, sys, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
for repo, folder, file in (("me/tiny", sys.argv[1], "model"), ("me/tiny-LoRA", sys.argv[2], "adapter_model")):
    card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
    lines = re.search("```python\\n(.*?)```", card, re.DOTALL)[1].replace("max_new_tokens=256", "max_new_tokens=4")
    names = {}
    exec(lines, names)
    kept = load_file(f"{folder}/{file}.safetensors")
    state = {key.replace(".default", ""): value for key, value in names["model"].state_dict().items()}
    assert kept and all(torch.equal(state[key], kept[key].to(state[key].dtype)) for key in kept)
    print(repo, len(kept), names["model"].__class__.__name__)
"""


def test_the_cards_own_lines_load_what_was_pushed_with_equal_weights(hub, tmp_path):
    """A merged model and an adapter on it, each through the lines of Python that its card tells people to use."""
    import numpy as np
    from safetensors.numpy import save_file

    from sft.export.card import write_card
    from sft.model import builtin

    base, run = builtin.local_model(builtin.TINY_RANDOM), tmp_path / "run"
    merged, adapter = run / "export" / "merged_16bit", run / "export" / "adapter"
    shutil.copytree(base, merged)
    shutil.copytree(base, adapter, ignore=shutil.ignore_patterns("model*", "*config.json"))
    shutil.copy(base / "tokenizer_config.json", adapter)
    layers = [f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    weights = {f"{name}.lora_{part}.weight": np.random.rand(*shape) for name in layers for part, shape in SHAPES.items()}
    save_file({name: array.astype("float32") for name, array in weights.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/tiny"}))
    (run / "preflight.json").write_text('{"template": "chat"}')
    for folder in (merged, adapter):
        write_card(folder, run, folder.name, "me/tiny")
        push(folder, "me/tiny", folder.name, True)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE")
    command = [sys.executable, "-c", USE_CARDS, str(merged), str(adapter)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("me/tiny")]
    assert [(repo, kind) for repo, _, kind in found] == [
        ("me/tiny", "LlamaForCausalLM"),
        ("me/tiny-LoRA", "PeftModelForCausalLM"),
    ]
    assert hub.asked("GET /me/tiny-LoRA/resolve/") and TOKEN not in done.stdout + done.stderr
