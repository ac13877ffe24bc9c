"""The pages in Chinese: every sentence has its translation, and none is left in English."""

import ast
import json
import re
from string import Formatter

import jinja2
import pytest
from jinja2 import nodes

from sft.config import method
from sft.paths import ASSETS, PACKAGE
from sft.report import charts, rollouts, texts
from sft.report import page as report_page
from sft.sweep import leaderboard
from sft.sweep.report import write_sweep_report
from tests.report import test_page, test_pairs
from tests.report.test_page import Page, sample, text_of
from tests.sweep.test_sweep import seeds_apart, sweep  # noqa: F401

TEMPLATES = ("report.html.j2", "sweep.html.j2")
CODE = [*(PACKAGE / "report").glob("*.py"), PACKAGE / "sweep/report.py", PACKAGE / "sweep/charts.py"]

COMPUTED = {
    *("Finished", "Stopped", "Failed", "Running", "finished", "stopped", "failed", "running", "waiting", "diverged"),
    *("Read", "Filtered", "Read eval", "min", "p50", "p90", "p99", "max", "mean", "better", "same", "worse", " ", ", "),
    *("Grad norm", "Memory gib", "Loss", "Learning rate", "loss", "reward", "Reward"),
    *("within noise of the best", "worse than before training"),
    *(title for facts in method.METHODS.values() for title in (facts.title, facts.title.capitalize())),
    *(word for _, title, _, lines in (*charts.CHARTS, *rollouts.CHARTS) for word in (title, *(line[1] for line in lines))),
}
"""Sentences that are not written where they are translated: the names of states, counts, metrics and charts."""


def said_in_templates() -> set[str]:
    jinja, found = jinja2.Environment(), set()
    for name in TEMPLATES:
        for call in jinja.parse((ASSETS / name).read_text("utf-8")).find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == "say":
                first = call.args[0]
                literal = [first] if isinstance(first, nodes.Const) else [*branches(first)]
                found |= {one.value for one in literal if isinstance(one, nodes.Const)}
    return found


def branches(node: nodes.Node) -> list[nodes.Node]:
    """The alternatives of a conditional expression; a computed sentence is in COMPUTED."""
    return [*branches(node.expr1), *branches(node.expr2)] if isinstance(node, nodes.CondExpr) else [node]


def said_in_code() -> set[str]:
    found = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say" and node.args:
                first = node.args[0]
                parts = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                found |= {one.value for one in parts if isinstance(one, ast.Constant)}
    return found


def said_of_sweeps() -> set[str]:
    """The sentences of the remarks: whatever ends like one in the functions that make them."""
    found = set()
    for node in ast.parse((PACKAGE / "sweep/leaderboard.py").read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and (node.name == "remark" or node.name.startswith("_check_")):
            texts_of = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            found |= {text for text in texts_of if re.search(r"[.:]$", text) and " " in text} - {ast.get_docstring(node)}
    return found


def test_every_sentence_has_its_translation_and_none_is_there_for_nothing():
    said = said_in_templates() | said_in_code() | said_of_sweeps() | COMPUTED
    assert len(said_in_templates()) > 150 and len(said_of_sweeps()) > 8
    assert sorted(said - texts.chinese().keys()) == [] and sorted(texts.chinese().keys() - said) == []


def test_a_translation_has_the_values_of_its_sentence():
    for english, chinese in texts.chinese().items():
        one, other = ({name for _, name, _, _ in Formatter().parse(text) if name is not None} for text in (english, chinese))
        assert one == other, english


def test_a_sentence_without_a_translation_stays_and_braces_of_a_name_are_no_values():
    assert texts.speaker("zh")("Reward: {odd}") == "Reward: {odd}"
    assert texts.speaker("en")("Better on {a}", a="{b}") == "Better on {b}"


@pytest.mark.parametrize("settings", [None, [], {"report": None}, {"report": {"lang": "fr"}}, {"report": {"lang": ["zh"]}}])
def test_a_run_without_the_setting_is_english(settings):
    assert texts.language_of({"settings": settings}) == "en"


def english_in(html: str, *data: str) -> list[str]:
    """Runs of two and more English words in the text of a page, its charts and its labels, less what is data."""
    page = Page(html)
    said = [page.text, *(one[name] for _, one in page.tags for name in ("aria-label", "data-done", "title") if name in one)]
    text = "\n".join([*said, *re.findall(r'"(?:title|label)": "([^"]*)"', page.scripts[0])])
    text = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text)
    for known in sorted(data, key=len, reverse=True):
        text = text.replace(known, "")
    return re.findall(r"[A-Za-z]{2,} [a-z]{2,}[A-Za-z ]*", text)


def test_a_chinese_page_of_a_run_has_no_english_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    settings = {"report": {"lang": "zh"}, "seed": 42}
    verify = {"reference": {"rows": 26, "prompts": 8, "loss": 1.5, "source": "held_out", "reward": 0.5},
              "artifacts": {"q8": {"status": "ok", "gain_kept": 1.0, "size_bytes": 1e8, "answers": 8, "answers_equal": 7,
                                   "near_ties": 1, "widest_tie": 0.1, "as_merged": 8, "margins": 2, "margins_kept": 2,
                                   "rewards": 1, "reward": 1.0, "reward_change": 0.0},
                            "q4": {"status": "failed", "failed": ["loss"], "gain_kept": 0.2, "size_bytes": 1e7},
                            "q2": {"status": "error", "error": "X"}}}  # fmt: skip
    metrics = [{"step": step, "loss": None if step == 7 else 2.0, "grad_norm": 1.0, "learning_rate": 1e-5} for step in range(9)]
    metrics += [{"step": step, "eval_loss": 2 - step / 9} for step in (0, 4, 8)]
    rollout = {"step": 1, "row": 1, "prompt": "p", "completions": [{"text": "", "finish": "length", "reward": 1.0}] * 20}
    of_run = {"artifacts": {"adapter": "adapter"}, "started_at": "2026-01-01T00:00:00+00:00", "settings": settings}
    run = {**test_page.RUN, **of_run, "metrics": {**test_page.RUN["metrics"], "kept_step": 8}}
    files = {
        "run.json": [run], "preflight.json": [{**test_page.PREFLIGHT, "warnings": ["W"]}], "metrics.jsonl": metrics,
        "samples.jsonl": [sample(0, ""), sample(4, "\n"), sample(8, "啦啦啦啦啦啦啦啦啦啦啦啦啦", finish="length")],
        "eval_rows.jsonl": [{"step": 0, "losses": [2.0] * 9, "targets": [3] * 9}, {"step": 8, "losses": [1.0] * 9}],
        "margins.jsonl": test_pairs.LINES, "rollouts.jsonl": [rollout, {**rollout, "row": 2}],
    }  # fmt: skip
    (tmp_path / "export").mkdir()
    for name, lines in {**files, "export/verify.json": [verify]}.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)), "utf-8")
    html = report_page.write_report(tmp_path).read_text("utf-8")
    assert '<html lang="zh-CN">' in html
    text = text_of(html)
    verdict = ("在没见过的样本上，比训练前更好", "9 条留出样本中，9 条变好，0 条变差。", "没有过拟合的迹象")
    for part in (*verdict, "推荐使用 q8：保留了全部提升，大小 100 MB。", "留出集（验证集）样本", "接下来可以做什么"):
        assert part in text, part
    commands = [line for line in re.findall(r'class="command code">([^<]*)', html)]
    assert english_in(html, *commands, test_pairs.EVIL, str(tmp_path), tmp_path.name) == []
    (tmp_path / "run.json").write_text(
        json.dumps({"settings": settings, "status": "failed", "artifacts": {"model": "m"}}), "utf-8"
    )
    for name in (*files, "export/verify.json"):
        if name != "run.json":
            (tmp_path / name).unlink()
    html = report_page.write_report(tmp_path).read_text("utf-8")
    commands = [line for line in re.findall(r'class="command code">([^<]*)', html)]
    assert english_in(html, *commands, tmp_path.name) == [] and "没有记录" in text_of(html)


def test_a_chinese_page_of_a_sweep_has_no_english_sentence(sweep):  # noqa: F811
    apart = seeds_apart({(8, 1): (2.0, 1.9), (8, 2): (3.0, 2.8), (16, 1): (2.0, 1.6), (16, 2): (3.0, 2.5)})
    alone = [("lora.r=8", 2.0), ("lora.r=16", 1.5, {"metrics": {"tokens": 9000}}), ("lora.r=32", None)]
    seeds = [(f"lora.r={r} seed={s} dataset.seed=1", 2 + s / 10) for r in (8, 16) for s in (1, 2, 3)]
    many = [(f"lora.r={r}", r / 8) for r in range(1, 15)]
    nothing = [("lora.r=8", None), ("lora.r=16", None)]
    for name, jobs in {"a": apart, "b": alone, "c": seeds, "d": many, "e": nothing}.items():
        board = leaderboard.read_leaderboard(sweep([(f"{words} report.lang=zh", *rest) for words, *rest in jobs], name))
        html = write_sweep_report(board).read_text(encoding="utf-8")
        assert '<html lang="zh-CN">' in html and "排名表" in text_of(html)
        assert english_in(html, *board.next_commands, board.index.command, "</script>") == [], name
