"""GGUF files of the model families, made of tiny random twins and proven; and a word with some of them, through `sft chat`."""

import functools
import json
import shutil

import pytest

from sft.export import gguf
from sft.storage.jsonio import read_json, read_lines
from tests import forked
from tests.conftest import ROOT, USERS_CACHE
from tests.faults.fault_campaign import write_rows
from tests.integration.test_families import GGUF, make_twin, train, without_charts  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("forked_children"),
    pytest.mark.skipif(bool(gguf.missing_parts()), reason=f"llama.cpp's parts are not installed: {gguf.INSTALL}"),
]


@functools.cache
def export(family: str, place):
    """The folder of a trained twin with its merged weights, and as GGUF files in 16 and in 8 bits."""
    # transformers splits the words of any Qwen2 as its own tokenizer does; the converter knows that by the whole vocabulary.
    words = USERS_CACHE / "tokenizers" / "qwen2_5" if family == "qwen2" else None
    if words and not words.is_dir():
        pytest.skip(f"the tokenizer of Qwen2.5 is not in {words}: python tests/fetch_tokenizers.py")
    job = (f"model.name={make_twin(family, place, words)}", write_rows(place), "export.formats=[merged_16bit,gguf]")
    return train(place / f"{family}-run", *job, "export.gguf.quantizations=[f16,q8_0]", "trainer.max_steps=2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, all_tokens):
    """`exported("lfm2")`: the run folder of this family's twin. Not to be changed."""
    return functools.partial(export, place=tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("family", [*GGUF, "qwen2"])
def test_the_gguf_files_of_a_family_are_proven(family, exported):
    proof = read_json(exported(family) / "export" / "verify.json")["artifacts"]
    assert proof.keys() == {"adapter", "merged_16bit", "gguf/f16", "gguf/q8_0"}
    assert all((facts["status"], facts["failed"]) == ("ok", []) for facts in proof.values())


def test_a_merged_phi_names_the_class_of_its_tokenizer_as_its_maker_does_and_loads_the_same(exported, tmp_path):
    """llama.cpp's converter tells Phi-4 from Phi-3 by that class."""
    from transformers import AutoTokenizer

    merged = exported("phi3") / "export" / "merged_16bit"
    named = read_json(merged / "tokenizer_config.json")
    assert named["tokenizer_class"] == "GPT2Tokenizer"
    found, kept = (AutoTokenizer.from_pretrained(place) for place in (merged, exported("phi3") / "adapter"))
    text = "Say 1234567, 'twas \u00e9t\u00e9 \u2014 don't!\n\n  \u597d<|im_end|>"
    assert found(text)["input_ids"] == kept(text)["input_ids"] and found.decode(found(text)["input_ids"]) == text
    shutil.copytree(merged, tmp_path / "merged")
    (tmp_path / "merged" / "tokenizer_config.json").write_text(json.dumps({**named, "tokenizer_class": "TokenizersBackend"}))
    with pytest.raises(gguf.ExportError, match=r"tokenizer\.model"):  # so the name does not outlive its cause
        gguf.convert(tmp_path / "merged", tmp_path / "model.gguf")


@pytest.mark.parametrize("where", ["run", "gguf"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text", "qwen3_moe"], ids=["dense", "hybrid", "mixture"])
def test_what_a_family_says_in_a_chat_is_what_it_said_at_the_end_of_its_training(family, where, exported):
    folder = exported(family)
    sample = [line for line in read_lines(folder / "samples.jsonl") if line["source"] == "held_out"][-1]
    place = folder if where == "run" else folder / "export" / "gguf" / "model-f16.gguf"
    done = forked.run("scripts/chat.py", f"run={place}", f"prompt={sample['question']}", "max_new_tokens=4", cwd=ROOT)
    assert done.returncode == 0 and done.stdout == sample["completion"].removesuffix("<|im_end|>") + "\n", done.stderr[-2000:]
    assert sample["completion"].strip()
