"""Talk to what was trained: prompts go through the training's own template, and completions come token by token."""

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.cli.target import find_run
from sft.config.consent import with_word
from sft.config.schema import Settings
from sft.errors import ExportError, Refusal, refuse
from sft.generation import batching
from sft.paths import PACKAGE, expanded
from sft.processes import child_environment
from sft.runs.saved import check_base, prompt_form, settings_of


@dataclass
class Target:
    """Whom to talk to."""

    name: str
    kind: str
    """`adapter` (a run's weights or a checkpoint), `merged` (a plain model folder), `gguf`, or `base`."""
    folder: Path
    """The run folder that it belongs to, whose settings and template count."""
    place: Path | None
    """The weights; None for those that the run kept."""
    settings: Settings


def find_target(text: str, consent: bool = False, base: str | None = None) -> Target:
    """Whom `run=<text>` names: a run, a checkpoint, an export of a run, or `base:<run>`, its model before training.

    `base` is where the run's model is now, if it is elsewhere. Raises Refusal, without reading a weight, if there is no such
    thing, it belongs to no run, its model's folder is gone, or the run needs code of its model that the command line does not
    allow (`consent`).
    """
    kind, _, rest = text.partition(":")
    place = expanded(rest if kind == "base" and rest else text)
    if place.suffix == ".gguf":
        owner = next((p for p in place.resolve().parents if (p / "run.json").is_file()), None)
        if not place.is_file() or owner is None:
            why = (
                "There is no such file." if not place.is_file() else "The file belongs to no run, so its template is not known."
            )
            raise refuse(
                f"run={text}", why, "run=outputs/<run>/export/gguf/model-q8_0.gguf\nllama-cli -cnv -m <file>   for any file"
            )
        from sft.export.gguf import missing_parts

        problems = missing_parts()
        if problems:
            raise refuse(f"run={text}", problems[0].why, problems[0].fix)
        return Target(place.name, "gguf", owner, place, settings_of(owner, consent)[0])
    folder, weights = find_run(str(place))
    settings, record = settings_of(folder, consent, base)
    plain = weights is not None and not (weights / "adapter_config.json").is_file() and weights.parent.name != "checkpoints"
    if (kind == "base" and rest) or (settings.lora.enabled and not plain):
        problems = check_base(folder, settings)
        if problems:
            raise Refusal(problems)
    if kind == "base" and rest:
        return Target(settings.model.name, "base", folder, None, settings)
    if weights is not None:
        return Target(weights.name, "merged" if plain else "adapter", folder, weights, settings)
    kept = folder / ("adapter" if settings.lora.enabled else "model")
    if not kept.is_dir():
        resumed = with_word(f"python train.py {shlex.quote(f'resume={text}')}", settings)
        fix = resumed if record.get("status") != "finished" else "train it again"
        raise refuse(f"run={text}", f"Nothing was trained there yet (status {record.get('status')}).", fix)
    return Target(folder.name, "adapter", folder, kept, settings)


class Speaker:
    """A loaded model that completes prompts."""

    def __init__(self, target: Target):
        """Load it. Raises Refusal if base or tokenizer cannot be had, ExportError if llama.cpp does not take the file."""
        from sft.model.tokenizer import read_tokenizer

        self.target, self.settings = target, target.settings
        kept = target.folder / ("adapter" if self.settings.lora.enabled else "model")
        self.shape, stops = prompt_form(target.folder)
        self.tokenizer, self.stop_ids = read_tokenizer(kept, self.settings.model.trust_remote_code, stops)
        self.child: Any = None
        self.model = None if target.kind == "gguf" else self._load()

    @property
    def remembers(self) -> bool:
        """Whether earlier turns can be part of the prompt: only a chat template has a place for them."""
        from sft.data.templates import choose_template

        return choose_template(self.settings.dataset, self.shape, self.tokenizer) == "chat"

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that ends with a question, as a row of the training would have them.

        Raises Refusal if the training's template does not take the turns.
        """
        from sft.data.cells import Turn
        from sft.data.prompts import conversation_ids

        spoken = [Turn(turn["role"], turn["content"]) for turn in turns]
        return conversation_ids(spoken, self.settings, self.shape, self.tokenizer)

    def complete(self, ids: list[int], say: Callable[[str], None], max_new_tokens: int, temperature: float = 0.0) -> str:
        """The completion of a prompt; `say` gets each piece of text as soon as its characters are whole.

        Greedy at temperature 0, as in samples.jsonl. An end mark is not part of the text.
        """
        writer = _Writer(self.tokenizer, self.stop_ids, say)
        if self.model is None:
            self._ask_child(ids, writer, max_new_tokens, temperature)
        else:
            self._generate(ids, writer, max_new_tokens, temperature)
        return writer.end()

    def close(self) -> None:
        """End the process of a GGUF file."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child.stdin.close()
            self.child.stdout.close()
            self.child = None

    def _load(self) -> Any:
        from sft.export import merge
        from sft.model import backend, loading
        from sft.plan.plan import plan_saved

        target = self.target
        if target.kind == "merged":
            return merge.load_merged(target.place, backend.torch_dtype(plan_saved(self.settings).dtype))
        if target.kind == "base":
            return loading.load_model(self.settings, plan_saved(self.settings))[0]
        return merge.load_trained(self.settings, target.place)

    def _generate(self, ids: list[int], writer: "_Writer", max_new_tokens: int, temperature: float) -> None:
        import torch
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        config = GenerationConfig(
            **sampling, max_new_tokens=max_new_tokens, eos_token_id=self.stop_ids, pad_token_id=self.tokenizer.pad_token_id
        )
        prompt = torch.tensor([ids], device=self.model.device)
        self.model.eval()
        with torch.no_grad(), contextlib.nullcontext() if temperature > 0 else batching.plain(self.model):
            self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=writer
            )

    def _ask_child(self, ids: list[int], writer: "_Writer", max_new_tokens: int, temperature: float) -> None:
        """One prompt for the process around llama.cpp, which prints a token id a line and `null` at the end."""
        if self.child is None:
            program = PACKAGE / "export" / "llama_cpp.py"
            command = [sys.executable, str(program), "chat", str(self.target.place)]
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                # Threads that wait actively slow each other down.
                env=child_environment(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0"),
                start_new_session=True,  # Ctrl-C stops a completion here, not the process
            )  # fmt: skip
        job = {"ids": ids, "max_new_tokens": max_new_tokens, "temperature": temperature, "stop_ids": self.stop_ids}
        try:
            self.child.stdin.write(json.dumps(job) + "\n")
            self.child.stdin.flush()
            while (line := self.child.stdout.readline()).strip() != "null":
                if not line:
                    raise ExportError(f"llama.cpp ended while it generated: {self.target.place}")
                writer.add([int(line)])
        except BrokenPipeError as error:
            raise ExportError(f"llama.cpp could not load {self.target.place}") from error
        except KeyboardInterrupt:
            self.close()  # it would go on generating
            raise


class _Writer:
    """Turns token ids into text as they come; transformers' `generate` takes it for a streamer."""

    def __init__(self, tokenizer: Any, stop_ids: list[int], say: Callable[[str], None]):
        self.tokenizer, self.stop_ids, self.say = tokenizer, stop_ids, say
        self.ids: list[int] = []
        self.shown = 0
        self._prompt = True

    def put(self, value: Any) -> None:
        """What `generate` calls: first with the prompt, then with each token."""
        if not self._prompt:
            self.add(value.flatten().tolist())
        self._prompt = False

    def add(self, ids: list[int]) -> None:
        """Say what the new tokens make whole: a character may take several."""
        self.ids += [i for i in ids if i not in self.stop_ids]
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.say(text[self.shown :])
            self.shown = len(text)

    def end(self) -> str:
        """The whole text; says what is left of it."""
        text = self.tokenizer.decode(self.ids)
        if len(text) > self.shown:
            self.say(text[self.shown :])
            self.shown = len(text)
        return text
