"""Hashes of settings never change: finished sweeps are not run again, and older run folders resume."""

import pytest

from sft.config import fingerprint
from tests.conftest import make_settings

STORED = {
    "": "56e0de4efe7336c4",
    "model=llama3_8b": "6894ce52d81f0b79",
    "model=tiny_random": "0b6d35812c2998f5",
    "dataset=ruozhiba": "41bf9e434103532f",
    "lora.r=8": "b17eaae654cdd0b7",
    "lora=none": "e68e40dd5e313fa4",
    "trainer=debug": "413aba29e5e2e5c4",
    "seed=7": "2611799d41f2fdb3",
    "seed=7 dataset.seed=7": "2611799d41f2fdb3",
    "dataset.max_rows=24": "dd2cb184388ae468",
    "trainer.learning_rate=1e-4": "b86ca7db51ea992e",
    "trainer.max_steps=60": "24a3100d31f062d0",
    "model.load_in_4bit=true": "ca80f5e13b446187",
    "trainer.effective_batch_size=16": "b5ca045b1b80a942",
    "trainer.extra.adam_beta2=0.95": "b3fe73bf2c59593e",
    "lora.target_modules=[q_proj,v_proj]": "6fe7561c8f2b6e2e",
    "trainer.padding_free=false": "37f2212ce18aa428",
    "method=dpo trainer.num_train_epochs=1 trainer.learning_rate=1e-4": "a7e420b98fe80fa3",
    "experiment=colab_notebook": "f8baa34af52804b0",
    "samples.max_new_tokens=8": "180ce275dbb9caaf",
    "samples.num_held_out=4": "56e0de4efe7336c4",
    "report.lang=zh": "56e0de4efe7336c4",
    "trainer.max_hours=2 tracking=none distributed=ddp export=all": "56e0de4efe7336c4",
}


@pytest.mark.parametrize("overrides", STORED)
def test_the_hash_of_stored_settings_is_what_it_was(overrides):
    assert fingerprint.config_hash(make_settings(*overrides.split())) == STORED[overrides]


@pytest.mark.parametrize(
    ("added", "changed"), [("lora.r", "lora.r=8"), ("lora", "lora.r=8"), ("model.revision", "model.revision=x")]
)
def test_a_setting_that_was_added_counts_only_where_it_is_not_at_its_default(monkeypatch, added, changed):
    """As if `added` were new: what was hashed before it was there has the hash of its default."""
    before = fingerprint.config_hash(make_settings())
    monkeypatch.setattr(fingerprint, "ADDED", (added,))
    without = fingerprint.config_hash(make_settings())
    assert without != before and fingerprint.config_hash(make_settings(changed)) != without
    group, _, name = added.partition(".")
    settings = fingerprint.jsonable(make_settings())
    kept = {k: v for k, v in settings[group].items() if k != name} if name else None
    monkeypatch.setattr(fingerprint, "ADDED", ())
    older = {**settings, group: kept} if name else {k: v for k, v in settings.items() if k != group}
    monkeypatch.setattr(fingerprint, "jsonable", lambda value: older)
    assert fingerprint.config_hash(make_settings()) == without


def test_a_file_of_rewards_counts_by_its_contents(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("def polite(completion, row):\n    return 1.0\n")
    settings = make_settings("method=grpo", f"method.reward_funcs=[number,'{file}:polite']")
    first = fingerprint.config_hash(settings)
    file.write_text("def polite(completion, row):\n    return 0.0\n")
    assert fingerprint.config_hash(settings) != first


def test_preferences_against_another_reference_are_another_run():
    assert fingerprint.config_hash(make_settings("method=dpo", "method.reference=base")) != fingerprint.config_hash(
        make_settings("method=dpo")
    )
