"""The chat template of a run: which one is taken, and the variables that are set in it."""

import difflib
import json
import math
import re
from typing import Any

from sft.config.keys import shown
from sft.errors import first_line, refuse
from sft.paths import expanded

# ChatML with every turn closed by <|im_end|>; for base models that bring no chat template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What transformers itself gives to a chat template (its apply_chat_template).
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "conversation",
         "chat_template"}  # fmt: skip


def choose_template(own: str | dict[str, str] | None, chosen: str | None, model: str) -> str | None:
    """The text of the chat template: what `model.chat_template` says, else the tokenizer's `own`.

    A tokenizer with several named templates has `default` taken, and `tool_use` for rows with tools, as transformers does;
    `model.chat_template` can name another of them. Raises Refusal where none of that fits.
    """
    named = own if isinstance(own, dict) else {}
    if chosen and chosen not in named:
        return _read_template(chosen, list(named))
    if chosen:
        return named[chosen]
    if not named:
        return own or None
    if "default" not in named:
        names = ", ".join(sorted(named))
        why = f"Its tokenizer has the chat templates {names}, and none of them is called default."
        raise refuse(f"model.name={model}", why, f"model.chat_template={min(named)}")
    default, with_tools = named["default"], named.get("tool_use", named["default"])
    if with_tools == default:
        return default
    return f"{{% if tools %}}{_inside(with_tools)}{{% else %}}{_inside(default)}{{% endif %}}"


def _inside(template: str) -> str:
    """A template as it reads the same inside a block: Jinja drops a line break that follows a tag, and a text's last one."""
    return ("\n" if template.startswith("\n") else "") + template.removesuffix("\n")


def set_variables(template: str | None, variables: dict[str, Any], model: str) -> str | None:
    """The template with `dataset.chat_template_kwargs` set at its head, so that whoever reads it renders as the training did.

    Raises Refusal for a variable that the template does not read or that cannot be set.
    """
    if not variables:
        return template
    what = "dataset.chat_template_kwargs"
    if not template:
        why = f"The tokenizer of {model} has no chat template that could read them."
        raise refuse(what, why, "model.chat_template=chatml dataset.chat_template_kwargs={}")
    read = _variables_of(template)
    for name in variables:
        if name in GIVEN:
            fix = f"{what}={{}}   in its place, to set none"
            raise refuse(f"{what}.{name}", "It is given to every chat template already.", fix)
        if not re.search(rf"\b{re.escape(name)}\b", template):
            known = f"it reads {', '.join(read)}" if read else "it reads none"
            close = difflib.get_close_matches(name, read, 1)
            fix = f"{what}={{}}   in its place, to set none"
            fix = f"{what}.{close[0]}={shown(variables[name])}\n{fix}" if close else fix
            raise refuse(
                f"{what}.{name}={shown(variables[name])}", f"The chat template of {model} does not read it; {known}.", fix
            )
    head = "".join(f"{{%- set {name} = {_literal(value, f'{what}.{name}')} %}}" for name, value in variables.items())
    return template if template.startswith(head) else head + template


def _variables_of(template: str) -> list[str]:
    """The variables that a chat template reads besides those that every one is given."""
    from jinja2 import Environment, TemplateError, meta

    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # a tag of transformers' own
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateError:
        return []
    known = GIVEN | {"raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token"}
    return sorted(meta.find_undeclared_variables(parsed) - known)


def _literal(value: Any, what: str) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_literal(one, what) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(str(k), ensure_ascii=False)}: {_literal(v, what)}' for k, v in value.items())}}}"
    raise refuse(
        f"{what}={value}", "A chat template takes texts, numbers, true, false, null, lists and objects.", f"{what}=true"
    )


def _read_template(value: str, names: list[str]) -> str:
    if value == "chatml":
        return CHATML
    if "{" in value:
        return value
    path = expanded(value)
    if not path.is_file():
        why = "Neither chatml, nor Jinja text, nor a file"
        why += f", nor one of the tokenizer's own templates: {', '.join(names)}." if names else "."
        raise refuse(f"model.chat_template={value}", why, "model.chat_template=chatml")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"The file cannot be read: {first_line(error)}"
        raise refuse(f"model.chat_template={value}", why, "model.chat_template=chatml") from error
