"""The report holds the whole run, survives broken and missing files, escapes all text, and asks the network for nothing."""

import json
import re
from html.parser import HTMLParser

import pytest

from sft.report import charts, formats, summary
from sft.report import page as report_page

EVIL = "</script><script>alert('owned')</script><!-- <img src=x onerror=alert(1)> <b>bold</b>"
RUN = {
    "status": "finished",
    "name": "twists-lora",
    "command": "python train.py lora.r=8",
    "settings": {"lora": {"r": 8, "target_modules": ["q_proj"]}, "seed": 42},
    "differs_from_defaults": {"lora.r": {"default": 16, "value": 8}},
    "data": {"source": "弱智吧", "hash": "abc", "train_rows": 1234, "eval_rows": 56, "train_tokens": 7, "eval_tokens": 8},
    "model": {"name": "tiny", "parameters": 2_000_000, "trainable_parameters": 20_000},
    "versions": {"torch": "2.13.0"},
    "hardware": {"cpu": "EPYC", "gpu": None},
    "seconds": {"train": 200.4, "total": 8000},
    "metrics": {"eval_loss_start": 2.0, "eval_loss": 1.5, "best_eval_loss": 1.4, "best_step": 20, "kept_step": 30, "steps": 30,
                "eos_share_start": 0.25, "eos_share": 1.0, "tokens_per_second": 2917.4, "memory_gib": 21.37},
}  # fmt: skip
PREFLIGHT = {
    "examples": [{"text": "问答", "input_ids": [1, 2, 3], "labels": [-100, 2, 3], "tokens": ["<|im_start|>", "问", "答"]}],
    "lengths": {"train": {"min": 3, "p50": 168, "p90": 402, "p99": 811, "max": 1024, "mean": 211.48}},
    "rows": {"read": 1300, "train": 1234},
    "truncated_rows": 31,
    "eos_token": "<|im_end|>",
    "warnings": ["31 rows were truncated"],
}


def sample(step: int, completion: str, **other) -> dict:
    return {"step": step, "index": 0, "source": "held_out", "prompt": "<|user|>为什么?", "question": "为什么?",
            "reference": "因为。", "completion": completion, "finish": "eos", **other}  # fmt: skip


@pytest.fixture
def page(tmp_path, monkeypatch):
    """`page(run=..., metrics=...)`: the report of a folder that holds these files; a str is written as it is."""
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")

    def write(run=None, metrics=None, samples=None, preflight=None) -> str:
        files = {"run.json": run, "metrics.jsonl": metrics, "samples.jsonl": samples, "preflight.json": preflight}
        for name, content in files.items():
            if isinstance(content, list):
                content = "".join(json.dumps(line) + "\n" for line in content)
            if content is not None:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        target = report_page.write_report(tmp_path)
        assert target == tmp_path / "report.html"
        assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]  # no temporary file stays
        return target.read_text("utf-8")

    return write


class Page(HTMLParser):
    """Collects the tags, their attributes, the text, and the content of each script."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


def charts_of(html: str) -> dict[str, dict | None]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return {chart["name"]: chart["spec"] for chart in json.loads(Page(html).scripts[0], parse_constant=refuse)}


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


def test_a_finished_run_shows_all_it_recorded(page):
    metrics = [{"step": step, "loss": 2 - step / 50, "learning_rate": 1e-4} for step in range(1, 31)]
    metrics += [{"step": 0, "eval_loss": 2.0}, {"step": 30, "eval_loss": 1.5}]
    html = page(RUN, metrics, [sample(0, "先前"), sample(15, "中途"), sample(30, "之后<|im_end|>")], PREFLIGHT)
    text = text_of(html)
    for part in ["Finished", "2.0000 → 1.5000 −25.0%", "best 1.4000 at step 20", "3 min 20 s", "2 h 13 min in total", "2,917",
                 "21.37 GiB", "1 of 1 → 1 of 1", "弱智吧", "1,234", "为什么?", "因为。", "先前", "中途", "之后", "ended by EOS",
                 "31 rows were truncated", "2 of 3 tokens are trained on", "211.5", "lora.target_modules", "2.13.0",
                 "2.00 M", "20,000 (1.00%)", "python train.py lora.r=8"]:  # fmt: skip
        assert part in text, part
    assert '<span class="chip">&lt;|im_end|&gt;</span>' in html
    assert '<span class="on" title="2">问</span>' in html and '<span title="1"><span class="chip">' in html
    drawn = charts_of(html)
    assert [name for name, spec in drawn.items() if spec] == ["loss", "learning_rate"]
    points = drawn["loss"]["data"]["values"]
    assert points[0] == {"step": 0, "eval_loss": 2.0} and points[-1]["loss"] == 1.4 and len(points) == 31
    assert "Not recorded: Completions ended by EOS, Gradient norm" in text and "Finished" in text
    (ring,) = [layer for layer in drawn["loss"]["layer"] if layer.get("mark", {}).get("style") == "kept-dot"]
    assert ring["data"]["values"][0]["step"] == 30 and "kept: step 30" in text


def test_the_last_answer_is_shown_and_earlier_ones_are_in_the_page(page):
    tags = Page(page(samples=[sample(0, "a"), sample(15, "b"), sample(30, "c")])).tags
    steps = [(attributes["data-step"], "hidden" in attributes) for _, attributes in tags if "data-step" in attributes]
    assert steps == [("15", True), ("30", False)]


def test_all_text_is_escaped(page):
    run = {**RUN, "name": EVIL, "reason": EVIL, "command": EVIL, "status": EVIL, "settings": {EVIL: {"a": EVIL}},
           "error": {"type": EVIL, "message": EVIL}, "versions": {EVIL: EVIL}, "data": {"source": EVIL},
           "differs_from_defaults": {EVIL: {"default": EVIL, "value": EVIL}}, "tracking": {"url": EVIL}}  # fmt: skip
    example = {"tokens": [EVIL], "input_ids": [EVIL], "labels": [1]}
    preflight = {"examples": [example], "warnings": [EVIL], "eos_token": EVIL, "template": EVIL, "rows": {EVIL: 1}}
    line = sample(0, EVIL, question=EVIL, prompt=EVIL, reference=EVIL, finish=EVIL, source=EVIL)
    html = page(run, [{"step": 1, "loss": 1.0, EVIL: None}], [line, {**line, "step": 5}], preflight)
    tags = Page(html).tags
    assert EVIL not in html and EVIL in Page(html).text
    assert [tag for tag, _ in tags].count("script") == 3  # chart data, chart library, the page's own
    assert not {"img", "b"} & {tag for tag, attributes in tags if attributes.get("onerror") or attributes.get("src")}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


def test_the_chart_data_cannot_end_its_script(page, monkeypatch):
    monkeypatch.setattr(charts, "CHARTS", [("loss", EVIL, ".4~f", [("loss", EVIL, "main")])])
    html = page(metrics=[{"step": 1, "loss": 1.0}])
    data = Page(html).scripts[0]
    assert json.loads(data)[0]["title"] == EVIL
    assert "<" not in data


def test_the_chart_library_cannot_end_its_script(page, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: 'x = "</SCRIPT><!-- <script>"')
    assert Page(page()).scripts[1] == r'x = "\x3c/SCRIPT>\x3c!-- \x3cscript>"'


def test_the_charts_library_is_bundled_once_and_again_where_its_copy_is_damaged(tmp_path, monkeypatch):
    made = []
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report_page.vl_convert, "javascript_bundle", lambda snippet: made.append(1) or f"/* {len(made)} */")
    assert [report_page.bundled_charts() for _ in range(3)] == ["/* 1 */"] * 3
    (copy,) = (tmp_path / "cache").glob("charts/*/charts.js")
    copy.write_text("/* 0 */")
    assert report_page.bundled_charts() == "/* 2 */"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "file"))
    assert [report_page.bundled_charts() for _ in range(2)] == ["/* 3 */", "/* 4 */"], "where nothing can be kept"


def test_torn_and_foreign_lines_are_left_out(page):
    html = page(
        RUN, '{"step": 1, "loss": 2.0}\n\nnot json\n[1]\n{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 3, "lo',
        '{"step": 0, "comp',
    )  # fmt: skip
    assert [point["step"] for point in charts_of(html)["loss"]["data"]["values"]] == [1, 2, 4]
    assert "no completions were sampled" in text_of(html)


def test_numbers_that_are_not_finite_are_named_and_not_drawn(page):
    html = page({**RUN, "metrics": {}}, '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN, "grad_norm": Infinity}\n'
                '{"step": 3, "loss": -Infinity}\n{"step": 4, "loss": 1e999}\n{"step": 5, "loss": 2.0}\n'
                '{"step": 6, "loss": 2.0}')  # fmt: skip
    assert [point["step"] for point in charts_of(html)["loss"]["data"]["values"]] == [1, 5, 6]
    assert charts_of(html)["grad_norm"] is None
    assert "Loss was not a finite number at 3 logged steps, first at step 2" in text_of(html)
    assert "training loss 2.0000" in text_of(html)


def test_a_failed_run_says_why(page):
    run = {"status": "failed", "reason": "out of memory", "error": {"type": "OutOfMemoryError", "message": "tried 2 GiB"},
           "metrics": None, "data": None, "model": None, "versions": None, "seconds": None, "hardware": None,
           "settings": None, "differs_from_defaults": None, "artifacts": None, "tracking": None}  # fmt: skip
    text = text_of(page(run, [{"step": 3, "loss": 2.5}]))
    for part in ["Failed", "out of memory", "OutOfMemoryError", "tried 2 GiB", "not recorded", "training loss 2.5000"]:
        assert part in text, part


@pytest.mark.parametrize("run", [None, "", "{", "[]", '"text"'])
def test_an_empty_folder_still_gives_a_page(page, tmp_path, run):
    text = text_of(page(run))
    assert tmp_path.name in text and "not recorded" in text


def test_half_an_emoji_does_not_stop_the_report(page):
    assert "好?" in page(samples='{"step": 0, "index": 0, "completion": "好\\ud83d"}\n')


def test_a_resumed_run_counts_each_step_once():
    rows = summary.merge_steps([{"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"loss": 1.0},
                               {"step": 2, "eval_loss": 1.0}])  # fmt: skip
    assert rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 1.0}]


@pytest.mark.parametrize("length", [charts.MAX_POINTS, charts.MAX_POINTS + 1, 40_001])
def test_a_long_curve_is_thinned_and_keeps_its_spikes_and_ends(length):
    curve = [{"step": step, "loss": 1.0} for step in range(length)]
    curve[777]["loss"], curve[778]["loss"] = 50.0, -50.0
    thin = charts.downsample(curve, "loss")
    assert len(thin) <= charts.MAX_POINTS
    assert {0, 777, 778, length - 1} <= {point["step"] for point in thin}
    assert thin == sorted(thin, key=lambda point: point["step"])


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert charts.smooth([5.0, *[1.0] * 99])[0] == 5.0
    assert charts.smooth([2.0] * 200) == pytest.approx([2.0] * 200)
    assert charts.smooth([]) == []


def test_two_points_are_no_chart_and_the_held_out_loss_is_drawn_once(page):
    two = [{"step": step, "eos_share": step / 4, "eval_loss": 2 - step / 10, "loss": 1.0} for step in (1, 2)]
    html = page(RUN, two)
    assert not any(charts_of(html).values()) and "eval_loss" not in charts_of(html)
    assert "Not drawn, with fewer than three points: Loss, Completions ended by EOS." in text_of(html)
    assert charts_of(page(RUN, [*two, {"step": 3, "loss": 1.0}]))["loss"]["data"]["values"][1]["eval_loss"] == 1.8


def test_a_short_curve_is_smoothed_over_five_points():
    smoothed = charts.smooth([0.0] * 20 + [5.0] * 10)
    assert smoothed[19] == 0.0 and smoothed[20] == pytest.approx(1.0, abs=0.02) and smoothed[29] < 5.0


def test_the_title_is_the_folder_and_the_name_of_the_run_stands_below(page, tmp_path):
    html = page(RUN)
    assert re.search(rf"<title>{tmp_path.name} ", html) and f"<h1>{tmp_path.name}</h1>" in html
    assert "twists-lora · tiny" in text_of(html)


def test_what_to_type_next_depends_on_the_ending_and_names_the_folder(page, tmp_path):
    run = {**RUN, "artifacts": {"adapter": "adapter"}, "working_folder": str(tmp_path.parent)}
    text = text_of(page(run))
    for command in ("chat.py run=", "export.py run=", "show_run.py run="):
        assert f"python scripts/{command}{tmp_path.name}" in text, command
    assert "resume=" not in text and "export=gguf" in text
    assert f"python train.py resume={tmp_path.name}" in text_of(page({**run, "status": "stopped"}))
    consent = {**run, "settings": {"model": {"trust_remote_code": True}}}
    assert f"chat.py run={tmp_path.name} model.trust_remote_code=true" in text_of(page(consent))
    assert f"chat.py run={tmp_path}" in text_of(page({**run, "working_folder": "/nowhere"}))


def test_the_page_of_a_job_leads_to_that_of_its_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    (job := tmp_path / "0_r=8").mkdir()
    link = '<a class="link" href="../report.html">'
    assert link not in report_page.write_report(job).read_text("utf-8")
    (tmp_path / "sweep.json").write_text("{}", "utf-8")
    assert link in report_page.write_report(job).read_text("utf-8")


def test_files_of_the_run_are_links_and_what_is_elsewhere_is_text(page, tmp_path):
    (tmp_path / "adapter é").mkdir()
    places = {"adapter": "adapter é", "gone": "gone", "up": f"../{tmp_path.name}", "root": "/etc", "odd": "javascript:alert(1)"}
    html = page({**RUN, "artifacts": places, "tracking": {"url": "javascript:alert(1)"}})
    links = [attributes["href"] for tag, attributes in Page(html).tags if tag == "a"]
    assert [link for link in links if not link.startswith("#")] == ["adapter%20%C3%A9"]


@pytest.mark.parametrize("value, text", [(5e-5, "5e-5"), (2e-4, "0.0002"), (1e20, "1e+20"), ("1e-05", "1e-05"), (0, "0")])
def test_a_small_setting_is_written_as_one_types_it(value, text):
    assert formats.setting(value) == text


def test_nothing_is_loaded_from_the_network(tmp_path):
    url = "https://wandb.ai/some/run"
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "tracking": {"mode": "online", "url": url}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    html = report_page.write_report(tmp_path).read_text("utf-8")  # with the true chart library
    page = Page(html)
    assert url in page.text
    links = [attributes.pop("href") for tag, attributes in page.tags if tag == "a"]
    assert [link for link in links if not link.startswith("#")] == [url], "followed where it is pressed"
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "http" not in policy
    assert not re.search(r"""(?:fetch|import|importScripts|url|open)\s*\(\s*['"`]?(?:https?:)?//""", html)
    assert not re.search(r"""@import|^\s*import\s.*from""", html, flags=re.MULTILINE)
    assert len(page.scripts) == 3 and "vegaEmbed" in page.scripts[1] and len(page.scripts[1]) > 500_000
