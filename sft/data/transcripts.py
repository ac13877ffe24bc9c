"""Conversations written as one text, `USER: ... ASSISTANT: ... FUNCTION RESPONSE: ...`, as Glaive has them."""

import json
import re

SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")

ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}

CALL = re.compile(r"<functioncall>\s*(.*)", re.S)

# {"name": "f", "arguments": '{"a": 1}'}: the arguments are JSON text in single quotes.
QUOTED = re.compile(r"""("arguments":\s*)'(.*)'(\s*})\s*$""", re.S)


def read_transcript(text: str) -> list[dict] | None:
    """The turns of such a text in OpenAI's form; None for a text that begins otherwise. Raises ValueError for a call that
    cannot be read.
    """
    parts = SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        return None
    turns = []
    for speaker, spoken in zip(parts[1::2], parts[2::2], strict=True):
        content = spoken.strip().removesuffix("<|endoftext|>").strip()
        found = CALL.search(content) if speaker == "ASSISTANT" else None
        if not found:
            turns.append({"role": ROLES[speaker], "content": content})
            continue
        call = found[1].strip()
        try:
            call = json.loads(QUOTED.sub(lambda m: m[1] + json.dumps(m[2]) + m[3], call))
        except json.JSONDecodeError as error:
            raise ValueError(f"a call that is no JSON: {error.msg} in {call[:60]!r}") from None
        turns.append({"role": "assistant", "content": content[: found.start()].strip() or None, "function_call": call})
    return turns
