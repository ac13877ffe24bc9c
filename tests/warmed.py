"""What each forked program would do again before its work begins, done once in the process that they are forked from.

It is imported there alone. What it leaves is kept by what it was made of, and it starts no thread.
"""

import contextlib

from huggingface_hub import ModelCard, ModelCardData
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from sft.cli.check import check_command_line
from sft.export import card
from sft.preflight import versions
from sft.report import page
from tests.conftest import ROOT, SMALL

WORDS = [*SMALL, "trainer=debug", "hydra.run.dir=run"]

with contextlib.chdir(ROOT):  # a test's own folder may have presets
    check_command_line(ROOT / "conf", WORDS)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        GlobalHydra.instance().hydra.get_mode("config", WORDS)
versions.differing()
page.find_template("report.html.j2")
card._template()
ModelCard.from_template(ModelCardData())  # as PEFT does with each adapter
get_checkpoint_conversion_mapping("llama")
