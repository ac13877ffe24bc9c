"""Files of a model that name code, files outside of its folder, or sizes that cannot be: refused by name, before loading."""

import json
import shutil

import pytest

from sft.config.schema import ModelSettings, Settings
from sft.errors import Refusal
from sft.model import builtin
from sft.model.files import check_model_files
from sft.model.tokenizer import load_tokenizer
from sft.preflight.checks import check_settings
from sft.preflight.findings import Found


@pytest.fixture
def model(tmp_path):
    """`model("config.json", key=value)`: the random model with these keys in one of its files."""
    folder = tmp_path / "model"
    shutil.copytree(builtin.local_model(builtin.TINY_RANDOM), folder)

    def edit(name, **keys):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | keys))
        return folder

    return edit


def refusal_of(folder, **options) -> str:
    with pytest.raises(Refusal) as refusal:
        load_tokenizer(ModelSettings(name=str(folder), **options))
    return str(refusal.value)


@pytest.mark.parametrize("keys", [
    {"attn_implementation": "attacker/kernel"}, {"_attn_implementation": "attacker/kernel"},
    {"text_config": {"_attn_implementation_internal": "attacker/kernel:fn"}}, {"attn_implementation": {"": "attacker/kernel"}},
    {"attn_implementation": ["attacker/kernel"]}, {"experts_implementation": "attacker/kernel"},
])  # fmt: skip
def test_an_attention_from_a_repository_needs_the_word(model, keys):
    folder = model("config.json", **keys)
    text = refusal_of(folder)
    assert ": config.json" in text and "attacker/kernel" in text and "hint: model.trust_remote_code=true" in text
    load_tokenizer(ModelSettings(name=str(folder), trust_remote_code=True))


@pytest.mark.parametrize("eos", [-5, 10**9, 1.5, "2", True, [2, -1]])
def test_stop_tokens_that_cannot_be_are_refused(model, eos):
    assert ": generation_config.json" in refusal_of(model("generation_config.json", eos_token_id=eos))


@pytest.mark.parametrize("eos", [None, 2, [0, 2]])
def test_stop_tokens_of_the_vocabulary_are_taken(model, eos):
    _, stop_ids = load_tokenizer(ModelSettings(name=str(model("generation_config.json", eos_token_id=eos))))
    assert 2 in stop_ids


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7])
def test_an_index_cannot_name_files_outside(model, name):
    folder = model("model.safetensors.index.json", weight_map={"a": "model.safetensors", "b": name})
    assert ": model.safetensors.index.json" in refusal_of(folder)


@pytest.mark.parametrize("start", [(2**40).to_bytes(8, "little"), b"\xff" * 8, b"abc", (4).to_bytes(8, "little") + b"nope"])
def test_weights_whose_header_cannot_be_are_refused(model, start):
    folder = model("config.json")
    (folder / "model.safetensors").write_bytes(start + b"" if len(start) < 8 else start + bytes(100))
    assert ": model.safetensors" in refusal_of(folder)


@pytest.mark.parametrize("shape", [5, {"a": 1, "b": 2}, None, "x"])
def test_headers_of_an_odd_form_end_without_a_traceback(model, shape):
    folder = model("config.json")
    header = json.dumps({"model.embed_tokens.weight": {"shape": shape}, "__metadata__": 5}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "odd.safetensors").mkdir()
    assert ": odd.safetensors" in refusal_of(folder)


@pytest.mark.parametrize("rows", [2**31, 49153])
def test_a_vocabulary_that_the_weights_do_not_have_is_refused(model, rows):
    text = refusal_of(model("config.json", vocab_size=rows))
    assert f"vocab_size is {rows}, and model.embed_tokens.weight in model.safetensors has 4096 rows" in text


def test_a_width_that_the_weights_do_not_have_is_refused(model):
    text = refusal_of(model("config.json", hidden_size=48))
    assert "hidden_size is 48, and model.embed_tokens.weight in model.safetensors has 64 columns" in text


@pytest.mark.parametrize(
    ("keys", "dtype"), [({"word_embed_proj_dim": 64, "hidden_size": 48}, "F32"), ({"hidden_size": 48}, "U32")]
)
def test_narrower_and_packed_embeddings_are_taken(model, keys, dtype):
    folder = model("config.json", **keys)
    write_header(folder, {"model.embed_tokens.weight": {"shape": [4096, 64], "dtype": dtype, "data_offsets": [0, 8]}}, 8)
    assert check_model_files(folder, ModelSettings(name=str(folder))) == []


def write_header(folder, header, data: int) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


@pytest.mark.parametrize(("places", "told"), [
    ([[0, 101]], "asks for 101 bytes of data, and 100 are there"), ([[0, 60], [50, 100]], "two tensors on each other"),
    ([[-4, 10]], "puts a tensor at [-4, 10]"), ([[10, 4]], "puts a tensor at [10, 4]"), ([[0]], "puts a tensor at [0]"),
    ([[0, True]], "puts a tensor at"), ([[0, 2**70]], "asks for 1,180,591,620,717,411,303,424 bytes"),
    ([None], "cannot be read"), ([["a", "b"]], "puts a tensor at"), ([[0, "b"], ["a", 1]], "cannot be read"),
])  # fmt: skip
def test_tensors_that_lie_where_they_cannot_are_refused(model, places, told):
    folder = model("config.json")
    tensors = {f"layer.{i}": {"shape": [1], "dtype": "F32", "data_offsets": place} for i, place in enumerate(places)}
    write_header(folder, tensors | {"__metadata__": {"format": "pt"}}, 100)
    text = refusal_of(folder)
    assert ": model.safetensors" in text and told in text


@pytest.mark.parametrize("eos", [-5, 10**9])
def test_stop_tokens_of_config_json_count_where_there_are_no_others(model, eos):
    folder = model("config.json", eos_token_id=eos)
    (folder / "generation_config.json").unlink(missing_ok=True)
    text = refusal_of(folder)
    assert ": config.json" in text and f"eos_token_id holds {eos}" in text


@pytest.mark.parametrize("text", ["[1]", "{", "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_files_of_an_odd_form_are_refused_by_name(model, name, text):
    folder = model("config.json")
    (folder / name).write_text(text)
    assert name in refusal_of(folder)


@pytest.mark.parametrize(("source", "told"), [("my_conf/model/odd.yaml", True), ("command line", False)])
def test_remote_code_that_a_file_asks_for_is_said(source, told):
    found = Found()
    check_settings(found, Settings(model=ModelSettings(trust_remote_code=True)), {"model.trust_remote_code": source})
    assert any(f"comes from {source}" in warning for warning in found.warnings) == told
