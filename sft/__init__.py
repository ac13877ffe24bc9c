"""Fine-tuning of language models with LoRA, composed by Hydra.

from sft import compose, run

result = run(compose("model=tiny_random", "trainer.max_steps=10"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.cli.api import compose, run
    from sft.errors import Refusal

__version__ = "0.1.0"

__all__ = ["Refusal", "compose", "run"]


def __getattr__(name: str) -> Any:
    """Load what `__all__` names when it is used: the modules below the command line must not load it with them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sft import errors
    from sft.cli import api

    return getattr(errors if name == "Refusal" else api, name)
