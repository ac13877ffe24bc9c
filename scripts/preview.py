"""Show what a run would train on: the first rows with the target tokens in colour and every special token visible.

    python scripts/preview.py model=llama3_8b dataset=ruozhiba
    python scripts/preview.py dataset=local dataset.path=my_data.jsonl

Takes the overrides of train.py. Loads the tokenizer but no weights, writes no run folder, and needs no GPU.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from sft.cli.check import read_settings
from sft.config.schema import Settings
from sft.environment import prepare_environment, quiet_libraries
from sft.errors import Refusal
from sft.sanitize import shown
from sft.threads import spin_briefly

spin_briefly()


def main(argv: list[str]) -> int:
    """Print the preview of the run that `argv` describes; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        show(read_settings(ROOT / "conf", argv, hardware=False))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


def show(settings: Settings) -> None:
    """Prepare the data as a run would, and print its facts and first rows."""
    prepare_environment()
    from sft.data import prepare
    from sft.data.audit import unused_columns
    from sft.model.tokenizer import load_tokenizer
    from sft.preflight.show import show_examples, terminal

    tokenizer, stop_ids = load_tokenizer(settings.model, settings.dataset.chat_template_kwargs)
    quiet_libraries()
    facts = prepare.prepare(settings, tokenizer, stop_ids).facts
    show_examples(terminal(), facts, tokenizer)
    rows, lengths = facts["rows"], facts["lengths"]["train"]
    held_out = f"{rows.get('eval', 0)} held out" + (f" from {facts['eval_source']}" if "eval_source" in facts else "")
    print(shown(f"Source    {facts['source']}: {rows['train']} rows to train on, {held_out}"))
    print(shown(f"Shape     {facts['shape']}, template {facts['template']}"))
    print(f"Tokens    median {lengths['p50']}, 90% under {lengths['p90']}, longest {lengths['max']};", end=" ")
    print(f"{facts['trained_tokens']:,} of {facts['train_tokens']:,} are target tokens")
    print(f"End mark  {' or '.join(facts['stop_tokens'])}; BOS {facts['bos_token']}; padding {facts['pad_token']}")
    for key in ("truncated_rows", "dropped_rows", "rows_without_labels", "rows_without_eos"):
        print(f"{key.replace('_', ' '):<20} {facts[key]}")
    if unused := unused_columns(facts["notes"]):
        print(shown(f"Columns that are not used, with their rows: {unused}"))
    for warning in facts["warnings"]:
        print(shown(f"warning: {warning}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
