"""Rows rendered and prepared."""

import json

import pytest

from sft.config.schema import ColumnSettings, DatasetSettings, Settings, Shape
from sft.data.prepare import prepare
from sft.data.templates import render_row
from sft.data.tokenize import IGNORED, encode
from tests.data.miniatures import REASONING


@pytest.fixture
def learn(make_tokenizer):
    """`learn(row, template)`: the text of a row and the runs of its learnt tokens, as text."""

    def learnt(row, template=REASONING, shape=Shape.messages, data=None):
        tokenizer = make_tokenizer(template)
        rendered = render_row(row, data or DatasetSettings(), shape, "chat", tokenizer)
        entry = next(iter(encode([rendered], tokenizer, {tokenizer.eos_token_id})))
        runs, before = [], False
        for token, label in zip(entry["input_ids"], entry["labels"], strict=True):
            if label != IGNORED:
                runs = runs if before else [*runs, []]
                runs[-1].append(token)
            before = label != IGNORED
        return rendered.text, [tokenizer.decode(run) for run in runs], rendered.notes

    return learnt


@pytest.fixture
def run(tmp_path, monkeypatch, make_tokenizer, loaded_tokenizer):
    """`run(rows, chat_template)`: these rows prepared with this chat template."""

    def prepared(rows, chat_template=REASONING, tokenizer=None, **options):
        monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        columns = options.pop("columns", {})
        columns = columns if isinstance(columns, ColumnSettings) else ColumnSettings(**columns)
        data = DatasetSettings(path=str(path), eval_fraction=0.0, shuffle=False, columns=columns, **options)
        return prepare(Settings(dataset=data), tokenizer or make_tokenizer(chat_template), loaded_tokenizer[1])

    return prepared
