"""The pages as a site: built with warnings as errors, whole in themselves, with links that lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.anchors = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        for key in ("href", "src"):
            if found.get(key):
                (self.links if tag == "a" else self.loads).add(found[key])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: it hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_link_inside_leads_to_a_page_and_its_heading(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) == len(list((ROOT / "docs").glob("*.md")))
    broken = []
    for path, page in pages.items():
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_a_page_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = Page(path.read_text(encoding="utf-8"))
        assert [address for address in page.loads if urlsplit(address).netloc] == [], path
    assert "http" not in (ROOT / "docs/assets/site.css").read_text(encoding="utf-8")


def test_every_figure_of_the_benchmarks_stands_in_the_log():
    """The page collects; a figure that only stands there has no command, machine and day behind it."""
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    told = (ROOT / "benchmarks/LOG.md").read_text(encoding="utf-8")
    figures = set(re.findall(r"\d+ min \d+ s|\d[\d.,]*\d|\d", re.sub(r"`[^`]*`|\(\S+\)", "", page)))
    assert len(figures) > 40 and {figure for figure in figures if figure not in told} == set()


def test_guides_and_code_carry_no_dated_measurements():
    """Those stand in benchmarks/LOG.md; the day in the name of a run's folder and the example of a time limit are none."""
    files = [
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("README*.md"),
        *(ROOT / "sft").rglob("*.py"),
        *(ROOT / "tests/gpu").glob("*.py"),
    ]
    allowed = r"outputs/20\d\d-|2026-12-31 17:30"
    dated = re.compile(r"\b20\d\d-\d\d-\d\d\b")
    lines = [(path, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(path.name, line) for path, line in lines if dated.search(re.sub(rf"({allowed})\S*", "", line))] == []
