"""Code that comes with a model is run at the word of whoever types the command, not of a folder that may come from elsewhere.

`model.trust_remote_code: true` in a run.json was said once, by somebody. A run of one's own and a stranger's look the same, so
that every command which loads the weights of a run asks for it anew. Imports nothing heavy.
"""

from sft.config.schema import Settings
from sft.errors import Problem, Refusal

WORD = "model.trust_remote_code=true"


def check_consent(settings: Settings, what: str, consent: bool) -> None:
    """Raise Refusal if a run's recorded settings have code run that was not asked for on this command line.

    `what` is the word of the command line that names the run, `consent` whether WORD stands beside it.
    """
    if settings.model.trust_remote_code and not consent:
        why = (
            f"Its settings have Python code run that comes with the model {settings.model.name}, with your rights. "
            "A folder cannot say that for you."
        )
        raise Refusal([Problem(what, why, f"{WORD}   beside it, if the run is yours or you have read that code")])


def with_word(command: str, settings: Settings) -> str:
    """A command that goes on with a run or uses it, with the word that this run needs."""
    return f"{command} {WORD}" if settings.model.trust_remote_code else command
