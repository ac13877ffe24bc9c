"""Show what a run would train on: the first rows with the target tokens in colour and every special token visible.

    python scripts/preview.py model=llama3_8b dataset=ruozhiba
    python scripts/preview.py dataset=local dataset.path=my_data.jsonl

Takes the overrides of train.py. Loads the tokenizer but no weights, writes no run folder, and needs no GPU.
"""

from typing import Any

from sft import console
from sft.cli.check import read_settings
from sft.config.schema import MethodName, Settings
from sft.environment import prepare_environment, quiet_libraries
from sft.errors import Refusal, refuse
from sft.paths import CONF
from sft.programs import as_called
from sft.sanitize import shown


@console.takes_json
def main(argv: list[str]) -> int:
    """Print the preview of the run that `argv` describes; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0
    try:
        show(read_settings(CONF, argv, hardware=False))
    except Refusal as refusal:
        console.say_refusal(refusal)
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
    prepared = prepare.prepare(settings, tokenizer, stop_ids)
    facts = prepared.facts
    show_examples(terminal(), facts, tokenizer)
    if settings.method.name == MethodName.grpo:
        show_rewards(settings, prepared.train, tokenizer, len(facts["examples"]))
    rows, lengths = facts["rows"], facts["lengths"]["train"]
    held_out = f"{rows.get('eval', 0)} held out" + (f" from {facts['eval_source']}" if "eval_source" in facts else "")
    print(shown(f"Source    {facts['source']}: {rows['train']} rows to train on, {held_out}"))
    print(shown(f"Shape     {facts['shape']}, template {facts['template']}"))
    print(f"Tokens    median {lengths['p50']}, 90% under {lengths['p90']}, longest {lengths['max']};", end=" ")
    if "prompts" in facts:
        print(f"completions have up to {settings.method.max_completion_length}")
    else:
        print(f"{facts['trained_tokens']:,} of {facts['train_tokens']:,} are target tokens")
    print(f"End mark  {' or '.join(facts['stop_tokens'])}; BOS {facts['bos_token']}; padding {facts['pad_token']}")
    for key in ("truncated_rows", "dropped_rows", "rows_without_labels", "rows_without_eos"):
        print(f"{key.replace('_', ' '):<20} {facts[key]}")
    if unused := unused_columns(facts["notes"]):
        print(shown(f"Columns that are not used, with their rows: {unused}"))
    for warning in facts["warnings"]:
        print(shown(f"warning: {warning}"))


def show_rewards(settings: Settings, rows: Any, tokenizer: Any, count: int) -> None:
    """Print what the reference answers of the first rows earn by each reward, and in all."""
    from sft.preflight.rewards import earned
    from sft.rewards import RewardFault, load_rewards

    rewards = load_rewards(settings.method)
    print("\nWhat a completion that is the reference answer earns:")
    for number, entry in enumerate(rows.select(range(count)), 1):
        try:
            values = earned(rewards, entry, tokenizer)
        except RewardFault as fault:
            raise refuse("method.reward_funcs", f"{fault}.", "mend the function that it names") from fault
        total = sum(reward.weight * value for reward, (_, value) in zip(rewards, values, strict=True))
        text = ", ".join(f"{name} {value:g}" for name, value in values)
        print(shown(f"Row {number}     {text}; with their weights {total:g}" + "   (no reference)" * (not entry["reference"])))
    print()
