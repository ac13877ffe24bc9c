"""Templates and patterns that never end, or take all memory, end with a refusal."""

import json
import signal
import threading

import pytest

from sft import limits
from sft.config.schema import DatasetSettings, Settings
from sft.data.prepare import prepare
from sft.errors import Refusal

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
HUGE = "{{ 'a' * 40000000000 }}{{ messages[0].content }}"


@pytest.fixture
def run(tmp_path, monkeypatch, make_tokenizer, loaded_tokenizer):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(limits, "SECONDS", 0.5)

    def prepared(rows, template=None, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        settings = Settings(dataset=DatasetSettings(path=str(path), eval_fraction=0.0, **options))
        return prepare(settings, make_tokenizer(template) if template else loaded_tokenizer[0], loaded_tokenizer[1])

    return prepared


@pytest.mark.parametrize(("template", "words"), [(ENDLESS, "more than 0.5 seconds"), (HUGE, "more than 4 GiB of memory")])
def test_a_template_that_never_ends_is_refused_with_one_that_does(run, template, words):
    rows = [{"instruction": f"q{n}", "output": "a"} for n in range(3)]
    with pytest.raises(Refusal, match=words) as refusal:
        run(rows, template)
    assert "row " in str(refusal.value) and "hint: model.chat_template=chatml" in str(refusal.value)


@pytest.mark.parametrize("group", ["keep", "drop"])
def test_a_pattern_that_never_ends_is_refused_with_its_row(run, group):
    rows = [{"instruction": "b", "output": "a"}, {"instruction": "a" * 40 + "!", "output": "a"}]
    with pytest.raises(Refusal) as refusal:
        run(rows, **{group: {"instruction": "^(a+)+$"}})
    assert f"dataset.{group}.instruction=^(a+)+$ at row 2 of the data" in str(refusal.value)


def test_a_timer_that_was_there_goes_on():
    before = signal.getsignal(signal.SIGALRM)
    old = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with limits.seconds_limited() as begin_row:
            begin_row()
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100 and signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *old)


def test_another_thread_works_without_a_limit():
    done = []

    def work():
        with limits.seconds_limited() as begin_row:
            begin_row()
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
