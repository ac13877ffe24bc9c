"""The model card: valid metadata, nothing guessed, nothing of this machine, and hostile texts that stay texts."""

import functools
import json
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sft.export.card import HUB_ID, clean, code, fence, write_card

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROW = {"status": "ok", "loss": 2.1, "loss_increase": 0.0003, "limit": 0.01, "answers_equal": 7, "near_ties": 1, "answers": 8,
       "widest_tie": 0.0123, "eos_share": 1.0, "size_bytes": 271_000_000, "seconds": 3.2, "failed": [],
       "checks": [{"name": "loss", "ok": True, "expected": "2.1", "found": "2.1"}]}  # fmt: skip
FAILED = {"status": "failed", "loss": 9.9, "failed": ["loss"],
          "checks": [{"name": "loss", "ok": False, "expected": "at most 2.11", "found": "9.9 in /home/me/y.gguf"}]}  # fmt: skip
VERIFY = {
    "reference": {"loss": 2.1, "rows": 26, "prompts": 8, "source": "held_out", "eos_share": 1.0},
    "artifacts": {"adapter": ROW, "merged_16bit": ROW, "merged_4bit": ROW, "gguf/f16": ROW, "gguf/q4_k_m": FAILED},
}


def make_run(**changes) -> dict:
    run = {
        "status": "finished",
        "command": "python train.py lora.r=8 dataset.path=/home/me/secret-project/rows.jsonl",
        "config_hash": "b4927d2db35f61a9",
        "seed": 3407,
        "git_commit": "0123456789abcdef",
        "settings": {
            "model": {"name": SMOLLM2, "revision": None},
            "dataset": {"name": "twists", "path": None},
            "lora": {"enabled": True, "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
        },
        "differs_from_defaults": {"lora.r": {"default": 16, "value": 8}},
        "data": {"source": "twists", "hash": "7574b874", "train_rows": 234, "eval_rows": 26},
        "model": {"name": SMOLLM2, "source": "embedded smollm2-135m-instruct-v1"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"cpu": "EPYC", "gpu": None},
        "metrics": {
            "eval_loss_start": 2.9,
            "eval_loss": 2.1,
            "steps": 30,
            "tokens": 9999,
            "eos_share_start": 0,
            "eos_share": 1,
        },
    }
    return run | changes


def make_samples(question="Why?", before="Because.", after="So that.") -> list[dict]:
    common = {"index": 0, "source": "held_out", "prompt": f"<|user|>{question}", "question": question, "reference": "Thus."}
    return [{**common, "step": 0, "completion": before}, {**common, "step": 30, "completion": after}]


@pytest.fixture
def card(tmp_path, monkeypatch):
    """`card(format="adapter", run=..., verify=...)`: the text of the card; a str is written as it is, None not at all."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return lambda format="adapter", repo=None, **files: write(tmp_path, format, repo, **files)


def write(place: Path, format="adapter", repo=None, run=None, samples=None, metrics=None, verify=None, names=()) -> str:
    folder = place / "run"
    artifact = folder / "export" / format
    artifact.mkdir(parents=True, exist_ok=True)
    for name in names:
        (artifact / name).write_text("x")
    metrics = metrics or [{"step": s, "loss": 3 - s / 30, "eval_loss": 2.9 - s / 40} for s in range(31)]
    contents = {"run.json": make_run() if run is None else run, "samples.jsonl": samples or make_samples(),
                "metrics.jsonl": metrics, "preflight.json": {"template": "chat"}, "export/verify.json": verify}  # fmt: skip
    for name, content in contents.items():
        (folder / name).unlink(missing_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    path = write_card(artifact, folder, format, repo)
    assert path == artifact / "README.md" and not list(artifact.glob(".*")), "complete, and nothing beside it"
    return path.read_text(encoding="utf-8")


def metadata(text: str) -> dict:
    """The front matter as a strict reader of YAML sees it."""
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert found == ModelCard(text).data.to_dict()
    return found


# ------------------------------------------------------------------------------------------------------ metadata


def test_the_front_matter_of_an_adapter(card):
    assert metadata(card()) == {
        "base_model": SMOLLM2,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["zh", "en"],
        "tags": ["sft", "lora"],
    }


@pytest.mark.parametrize(
    ("format", "repo", "verify", "base", "relation", "library"),
    [
        ("merged_16bit", "me/m", VERIFY, SMOLLM2, "finetune", "transformers"),
        ("merged_4bit", "me/m", VERIFY, "me/m", "quantized", "transformers"),
        ("gguf", "me/m", VERIFY, "me/m", "quantized", None),
        ("gguf", "me/m", None, SMOLLM2, "finetune", None),
        ("gguf", None, VERIFY, SMOLLM2, "finetune", None),
    ],
)
def test_what_an_artifact_is_made_of(card, format, repo, verify, base, relation, library):
    found = metadata(card(format, repo, verify=verify))
    assert (found["base_model"], found["base_model_relation"], found.get("library_name")) == (base, relation, library)
    assert ("gguf" in found["tags"]) == (format == "gguf")


def test_a_data_set_of_the_hub_is_linked_and_a_local_file_is_not(card):
    settings = {"model": {"name": SMOLLM2}, "dataset": {"name": "some/set", "path": None}}
    found = metadata(card(run=make_run(settings=settings, data={"source": "some/set (train)"})))
    assert found["datasets"] == ["some/set"] and "language" not in found
    settings["dataset"] = {"name": "some/set", "path": "/home/me/data/rows.jsonl"}
    text = card(run=make_run(settings=settings, data={"source": "/home/me/data/rows.jsonl"}, command=""))
    assert "datasets" not in metadata(text) and "`rows.jsonl`" in text and "/home" not in text
    assert "a file of the author's own" in text


def local_base(folder: Path, readme: str | None) -> dict:
    folder.mkdir(exist_ok=True)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    settings = {"model": {"name": str(folder)}, "dataset": {"name": "twists"}}
    return make_run(settings=settings, model={"name": str(folder), "source": f"local folder {folder}"}, command="")


def test_the_licence_of_a_local_base_is_its_own_cards(card, tmp_path):
    text = card(run=local_base(tmp_path / "mine", "---\nlicense: mit\n---\n"))
    assert metadata(text)["license"] == "mit" and "base_model" not in metadata(text)
    assert "`mine`" in text and str(tmp_path) not in text
    other = "---\nlicense: other\nlicense_name: my-terms\nlicense_link: https://example.org/terms\n---\n"
    found = metadata(card(run=local_base(tmp_path / "mine", other)))
    assert (found["license"], found["license_name"], found["license_link"]) == (
        "other", "my-terms", "https://example.org/terms")  # fmt: skip


@pytest.mark.parametrize("readme", [None, "# no front matter", "---\nlicense: [a, {\n---\n", "---\nlicense: <b>x</b>\n---\n",
                                    "---\n- a list\n---\n"])  # fmt: skip
def test_a_licence_that_is_not_known_is_left_out_and_said_so(card, tmp_path, readme):
    text = card(run=local_base(tmp_path / "mine", readme))
    assert "license" not in metadata(text) and "not known: its card is not at hand or names none" in text


def test_licences_come_from_cards_in_the_hubs_cache(card, tmp_path):
    for kind, name, licence in (("models", "a--b", "llama3"), ("datasets", "c--d", "cc-by-4.0")):
        root = tmp_path / "cache" / f"{kind}--{name}"
        (root / "snapshots" / "1234").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("1234")
        language = "language: [fr, not-a-code]\n" if kind == "datasets" else ""
        (root / "snapshots" / "1234" / "README.md").write_text(f"---\nlicense: {licence}\n{language}---\n")
    settings = {"model": {"name": "a/b"}, "dataset": {"name": "c/d"}}
    text = card(run=make_run(settings=settings, model={"name": "a/b", "source": "hub a/b"}, data={"source": "c/d (train)"}))
    assert metadata(text)["license"] == "llama3" and metadata(text)["language"] == ["fr"] and "`cc-by-4.0`" in text


# --------------------------------------------------------------------------------------------------------- content


def test_the_card_tells_the_whole_story(card):
    text = card(verify=VERIFY)
    for words in (
        "fine-tuned on `twists`", "`7574b874`", "234 rows trained on, 26 held out", "| `lora.r` | `8` | `16` |",
        "2.9000 before, 2.1000 after", "| 0 | 3.0000 | 2.9000 |", "| 30 | 2.0000 | 2.1500 |", "Because.", "So that.", "Thus.",
        "| `adapter` | passed | 2.1000 | +0.0003 | 0.01 | 7 of 8, ties: 1 (at most 0.012 nats) | 100% | 271.0 MB |",
        "| base model | `apache-2.0` |",
        "AutoPeftModelForCausalLM", "`0123456789abcdef`", "| `torch` | `2.13.0` |", "held out of the training",
        "python train.py lora.r=8 dataset.path=rows.jsonl",
    ):  # fmt: skip
        assert words in text, words
    assert "gguf" not in text and text.count("\n| 1") <= 6, "a small table, not every step"


def test_each_format_says_how_to_use_it(card):
    merged = card("merged_16bit", "me/model")
    assert 'AutoModelForCausalLM.from_pretrained("me/model"' in merged and "peft" not in merged and "# model\n" in merged
    compile(merged.split("```python\n")[1].split("```")[0], "card", "exec")
    compile(card().split("```python\n")[1].split("```")[0], "card", "exec")
    gguf = card("gguf", "me/Model", names=("f16.gguf", "q8_0.gguf", "adapter-f16.gguf", "Modelfile"))
    assert "llama-cli --hf-repo me/Model-GGUF --hf-file q8_0.gguf" in gguf and "--lora adapter-f16.gguf" in gguf
    assert "ollama create model -f Modelfile\nollama run model\n" in gguf
    assert "llama-cli -m f16.gguf" in card("gguf")


def test_only_the_rows_of_the_format_are_shown_and_failures_are_named(card):
    text = card("gguf", verify=VERIFY)
    assert "| `gguf/f16` | passed |" in text and "| `gguf/q4_k_m` | `failed` |" in text and "`adapter`" not in text
    assert "| `gguf/q4_k_m` | `loss` | `at most 2.11` | `9.9 in y.gguf` |" in text


def test_an_artifact_without_proof_says_so(card):
    assert "was not compared with the trained model" in card() and "was not compared" in card("gguf", verify={"artifacts": {}})


def test_a_run_that_failed_is_not_dressed_up(card):
    assert "| the run | `stopped`: `SIGINT at step 3` |" in card(run=make_run(status="stopped", reason="SIGINT at step 3"))


def test_a_prompt_without_a_chat_template_is_shown(card, tmp_path):
    card()
    (tmp_path / "run" / "preflight.json").write_text('{"template": "alpaca"}')
    text = write_card(tmp_path / "run" / "export" / "adapter", tmp_path / "run", "adapter").read_text()
    assert "prompts of this form" in text and "<|user|>Why?" in text and "apply_chat_template" not in text


def test_missing_and_broken_files_leave_gaps(tmp_path):
    (tmp_path / "a").mkdir()
    text = write_card(tmp_path / "a", tmp_path, "adapter").read_text()
    assert metadata(text)["tags"] == ["sft", "lora"] and "not known" in text
    for name in ("run.json", "preflight.json", "metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text('{"torn": ')
    assert metadata(write_card(tmp_path / "a", tmp_path, "adapter").read_text())["library_name"] == "peft"


@pytest.mark.parametrize("junk", [None, 5, "text", [1], {"a": {"b": 1}}, True, [{"step": "x"}]])
def test_values_of_the_wrong_kind_do_not_stop_the_card(card, junk):
    run = {key: junk for key in make_run()}
    verify = {"reference": junk, "artifacts": {"adapter": junk, "gguf/f16": {"checks": junk, "loss": junk, "status": junk}}}
    for format in ("adapter", "gguf"):
        metadata(
            card(format, run=run, verify=verify, metrics=[{"step": 1, "loss": junk}], samples=[{"step": 0, "completion": junk}])
        )
    metadata(card(run=make_run(settings={"model": junk, "dataset": junk, "lora": junk}, metrics={"eval_loss": junk})))


def test_nothing_of_this_machine_is_published(card, tmp_path):
    home = "/home/somebody/secret-project"
    values = {
        "dataset.path": f"{home}/rows.jsonl", "model.name": f"{home}/models/base", "model.chat_template": f"{home}/chat.jinja",
        "trainer.extra": {"logging_dir": f"{home}/logs/tb"}, "samples.prompts": [f"What is in {home}/notes/a.txt?"],
        "dataset.eval_split": "C:\\Users\\somebody\\x.csv", "tracking.entity": "somebody", "export.hub.repo": "somebody/x",
        "dataset.revision": "../../somebody/x", "dataset.config_name": "~/somebody/x",
    }  # fmt: skip
    command = (
        f"python {home}/train.py dataset.path={home}/rows.jsonl 'model.name=\"{home}/models/base\"' "
        f"--config-dir {home}/conf hydra.searchpath=[file://{home}/conf] +trainer.extra.x={home}/y resume=../somebody/run"
    )
    run = local_base(tmp_path / "base", None) | {
        "command": command,
        "differs_from_defaults": {key: {"default": None, "value": value} for key, value in values.items()},
    }
    run["data"]["source"] = run["settings"]["dataset"]["path"] = f"{home}/rows.jsonl"
    text = card(run=run)
    for secret in ("somebody", "secret-project", str(tmp_path), "/home"):
        assert secret not in text, secret
    for name in ("rows.jsonl", "chat.jinja", "`base`", "a.txt", "train.py", "--config-dir conf"):
        assert name in text, name


# -------------------------------------------------------------------------------------------------- hostile texts

NASTY = [
    "</code></pre><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "---\nlicense: mit\n---\n", "\n---\n\n# Title\n",
    "```\n# out of the fence\n```", "````````", "~~~\nx", "| a | b |\n|---|---|", "\\| \\` \\\\|", "`x` ``y`` `", "a`|`b",
    "[click](javascript:alert(1))", "![](http://evil/x.png)", "https://evil.example/x", "<https://evil.example>",
    "@everyone #1",
    "\x1b[31mred\x1b]0;title\x07", "\u202eesrever", "{{ 7*7 }} {% for x in y %}", "{# c #}", "&lt;b&gt; &#60;", "$$x$$ :smile:",
    "../../etc/passwd", "a\r\nb\rc\u2028d", "\ud83d", "> quote\n- list\n1. list\n\n    code", "<!-- comment", "]]>",
    "*b* _i_ ~s~",
    "", " ", "\x00", "key: value\n...", "!!python/object:os.system x", "%YAML 1.2", "'\"", "- [ ] x", "a" * 5000,
]  # fmt: skip


class Skeleton(HTMLParser):
    """The tags of a page in order, its attributes, and its text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.tags.append("comment")


def rendered(text: str) -> Skeleton:
    body = ModelCard(text).text
    return Skeleton(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))


def hostile_files(evil: str) -> dict:
    run = make_run(command=evil, status=evil, git_commit=evil, config_hash=evil, seed=evil, hardware={"cpu": evil})
    run["model"] = {"name": evil, "source": evil}
    run["data"] = {"source": evil, "hash": evil}
    run["settings"] = {"model": {"name": evil}, "dataset": {"name": evil}, "lora": {"enabled": True, "r": evil}}
    run["differs_from_defaults"] = {
        evil or "k": {"default": evil, "value": [evil]},
        "x": {"value": evil, "default": {evil: evil}},
    }
    run["versions"] = {"torch": evil}
    samples = [line | {"reference": evil or "r"} for line in make_samples(evil or "q", evil, evil)]
    row = {"status": evil, "checks": [{"name": evil, "ok": False, "expected": evil, "found": evil}], "loss": evil}
    return {"run": run, "samples": samples, "verify": {"artifacts": {"adapter": row}}}


@functools.cache
def harmless() -> tuple[Skeleton, dict]:
    with tempfile.TemporaryDirectory() as place:
        text = write(Path(place), **hostile_files("word"))
    return rendered(text), metadata(text)


def check_hostile(place: Path, evil: str) -> None:
    text = write(place, **hostile_files(evil))
    page, (expected, front) = rendered(text), harmless()
    if evil.strip():  # blank values leave lines of the card out
        assert page.tags == expected.tags, "no tag, cell or block more or less than with a harmless word"
        assert page.attributes == expected.attributes
    assert not {"script", "img", "a", "comment"} & set(page.tags)
    assert metadata(text) == front, "the front matter is ours alone"
    assert clean(evil)[:1500] in page.text and not set("\x1b\u202e\x00") & set(text)


@pytest.mark.parametrize("evil", NASTY)
def test_nasty_texts_stay_texts(tmp_path, evil):
    check_hostile(tmp_path, evil)


@given(st.text(alphabet=st.characters() | st.sampled_from("`|<>-#\\\n*_[]()!&{}%~:=+\"'"), min_size=1, max_size=80))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_stays_text(tmp_path, evil):
    assume(not HUB_ID.fullmatch(evil))  # such a name, as `0/0`, stands in the front matter by right
    check_hostile(tmp_path, evil)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_code_and_fences_cannot_be_left(text):
    line, block = code(text, 10_000), fence(text, 10_000)
    assert "\n" not in line and "|" not in line
    page = Skeleton(MarkdownIt("commonmark", {"html": True}).enable("table").render(f"a {line} b\n\n{block}\n\nend"))
    assert page.tags == ["p", "code", "/code", "/p", "pre", "code", "/code", "/pre", "p", "/p"]
    assert page.text.startswith("a " + (" ".join(clean(text).split()) or "(empty)") + " b")
