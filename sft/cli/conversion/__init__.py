"""Settings of another project's run in this project's words: an Unsloth notebook, an Axolotl or a LLaMA-Factory config.

Every key is carried over, needs nothing here, or is listed as not carried over, each with the reason. Nothing of a notebook is
run; YAML goes through the safe loader.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from sft.cli.conversion.axolotl import convert_axolotl
from sft.cli.conversion.carried import Conversion
from sft.cli.conversion.llamafactory import convert_llamafactory
from sft.cli.conversion.notebook import convert_notebook
from sft.errors import Refusal, first_line, refuse


def convert(path: Path, method: str | None = None) -> Conversion:
    """Read a notebook, a script or a config, whose method may be another. Raises Refusal for a file of none of the three kinds,
    and for a method that there is not here.
    """
    try:
        made = convert_notebook(path) if path.suffix in (".ipynb", ".py") else _convert_yaml(path)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise refuse(
            f"from={path}", f"A value in it is of another kind than it should be: {first_line(error)}.", "mend it"
        ) from error
    steps = made.values.get("trainer.max_steps", -1)
    if isinstance(steps, int) and steps > 0:  # the epochs would be ignored
        made.needless[made.sources.pop("trainer.num_train_epochs", "epochs")] = "max_steps decides the length"
        made.values.pop("trainer.num_train_epochs", None)
    if made.problems and method is None:
        raise Refusal(made.problems)
    if method and method != made.choices.get("method", "sft"):
        made.values = {key: value for key, value in made.values.items() if not key.startswith("method.")}
    if made.choices.get("lora") == "none":
        made.values = {key: value for key, value in made.values.items() if not key.startswith("lora.")}
    return made


def _convert_yaml(path: Path) -> Conversion:
    plain = _read_yaml(path)
    if "base_model" in plain:
        return convert_axolotl(plain, path)
    if "model_name_or_path" in plain:
        return convert_llamafactory(plain, path)
    why = "It has neither base_model, as Axolotl's configs, nor model_name_or_path, as LLaMA-Factory's."
    raise refuse(f"from={path}", why, "data=my_data.jsonl   to begin with a file of rows")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise refuse(f"from={path}", f"It cannot be read as YAML: {first_line(error)}.", "mend the file") from error
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise refuse(f"from={path}", "It is no table of settings.", "data=my_data.jsonl   to begin with a file of rows")
    # YAML reads 2e-4 as a text.
    return {
        key: float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", value) else value
        for key, value in plain.items()
    }
