"""The Modelfile's prompts are those of training: in Python always, and in Go's own engine where `go` is there."""

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from sft.config.schema import ColumnSettings, DatasetSettings, Settings, Shape
from sft.data.cells import Turn
from sft.data.prompts import conversation_ids, conversation_text
from sft.errors import ExportError
from sft.export.ollama import fill, find_pieces, go_string, go_template, make_modelfile, write_modelfile
from sft.model.chat_template import CHATML
from tests.data.test_templates import FORGETFUL, GEMMA, LLAMA3, MISTRAL, OPEN_ENDED, QWEN3

PROGRAM = Path(__file__).parent.parent / "golang" / "render.go"
# The system prompt stands inside of the first question, as Gemma 3 and Llama 2 have it.
FOLDED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + m.role + '\n' + (s if loop.first else '') + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
# Everything that Go or a Modelfile could take for its own.
NASTY = '{{ .System }}"""\t`x`\u3000\\n{% raw %}}}{{/* */}}\u200b|'
NASTY_CHATML = CHATML.replace("'<|im_start|>'", json.dumps(NASTY, ensure_ascii=False) + " + '<|im_start|>'", 1)

TEXT = '<<{system}>> Q: {instruction} """\\n{{.}} {prompt}{input}\\nA: {output}!'
SHAPE = Shape.instruction
RUOZHIBA = ColumnSettings(instruction=None, input="instruction")
CASES = {
    "smollm2": ("its own", False, DatasetSettings(), SHAPE),
    "smollm2, system prompt set": ("its own", False, DatasetSettings(system_prompt="只用中文。\n\"\"\"{{x}}\"\"\""), SHAPE),
    "chatml": (CHATML, True, DatasetSettings(), Shape.messages),
    "llama 3": (LLAMA3, True, DatasetSettings(), Shape.conversations),
    "llama 3 without a BOS of the tokenizer's": (LLAMA3, False, DatasetSettings(), SHAPE),
    "gemma": (GEMMA, True, DatasetSettings(), SHAPE),
    "gemma 3": (FOLDED, True, DatasetSettings(), SHAPE),
    "qwen 3": (QWEN3, False, DatasetSettings(), SHAPE),
    "mistral": (MISTRAL, True, DatasetSettings(), Shape.messages),
    "mistral, system prompt set": (MISTRAL, True, DatasetSettings(system_prompt="Be kind."), SHAPE),
    "open ended": (OPEN_ENDED, False, DatasetSettings(), Shape.prompt_completion),
    "forgetful": (FORGETFUL, False, DatasetSettings(), SHAPE),
    "nasty": (NASTY_CHATML, False, DatasetSettings(), SHAPE),
    "alpaca": (None, True, DatasetSettings(template="alpaca"), SHAPE),
    "ruozhiba": (None, False, DatasetSettings(template="alpaca", columns=RUOZHIBA), SHAPE),
    "plain": (None, False, DatasetSettings(template="plain"), Shape.prompt_completion),
    "text": (None, True, DatasetSettings(template="plain"), Shape.text),
    "a text": (None, True, DatasetSettings(template=TEXT), SHAPE),
    "a text of turns": (CHATML, False, DatasetSettings(template="{system}|{prompt}\\n{output}"), Shape.messages),
    "a text, system prompt set": (None, False, DatasetSettings(template=TEXT, system_prompt="s"), SHAPE),
}  # fmt: skip
QUESTIONS = [
    "Why is the sky blue?",
    "天空为什么是蓝色的？\n\n- 一\n- 二",
    '{{ .Response }} """x""" {% if %} \\n `y`',
    "ünï 😀 %d",
]
ANSWERS = ["Because.", "因为瑞利散射。\n再见", "{{ end }}"]


@pytest.fixture
def case(request, make_tokenizer, tokenizer):
    template, adds_bos, data, shape = CASES[request.param]
    made = make_tokenizer(
        tokenizer.chat_template if template == "its own" else template,
        bos="<s>", adds_bos=adds_bos, special=("<|eot_id|>", "<end_of_turn>"),
    )  # fmt: skip
    return request.param, Settings(dataset=data), shape, made


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


def conversations(takes_system: bool = True) -> list[list[Turn]]:
    """Conversations of one to six questions, with and without a system prompt."""
    found = []
    for system in (None, *(("Be brief.", '答案要短。\n"""{{ . }}"""') if takes_system else ())):
        for count in (1, 2, 3, 6):
            turns = [Turn("system", system)] if system else []
            for k in range(count):
                turns.append(Turn("user", QUESTIONS[(k + count) % len(QUESTIONS)]))
                if k < count - 1:
                    turns.append(Turn("assistant", ANSWERS[k % len(ANSWERS)]))
            found.append(turns)
    return found


@every_case
def test_the_pieces_make_the_prompts_of_training(case):
    name, settings, shape, tokenizer = case
    pieces = find_pieces(settings, shape, tokenizer)
    for turns in conversations(name not in ("gemma", "forgetful")):
        text = fill(pieces, turns)
        assert text == conversation_text(turns, settings, shape, tokenizer)
        # Read as llama.cpp reads it, the text is the ids of training, BOS once among them. Only its end is left out: GPT-2's
        # tokenizer reads line breaks otherwise where nothing follows them.
        ids, wanted = tokenizer(text)["input_ids"], conversation_ids(turns, settings, shape, tokenizer)
        assert ids[:-1] == wanted[: len(ids) - 1]
        # Where the answer follows the question with nothing between, its first token may take letters of the question.
        assert tokenizer.decode(ids) == tokenizer.decode(wanted) or name == "plain"


@functools.cache
def renderer() -> list[str]:
    """The Go program, built once; the tests that need it are skipped without `go`."""
    if not shutil.which("go"):
        pytest.skip("needs Go (apt-get install golang-go)")
    folder = Path(tempfile.mkdtemp(prefix="sft-go-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / "render"
    done = subprocess.run(["go", "build", "-o", target, PROGRAM], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [str(target)]


def render_in_go(modelfile: str, conversations: list[list[Turn]]) -> list[str]:
    """Each conversation through the TEMPLATE of a Modelfile, read as Ollama reads both."""
    messages = [[{"Role": t.role, "Content": t.content} for t in turns] for turns in conversations]
    asked = json.dumps({"Modelfile": modelfile, "Conversations": messages})
    done = subprocess.run(renderer(), input=asked, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@every_case
def test_go_renders_the_prompts_of_training(case):
    name, settings, shape, tokenizer = case
    turns = conversations(name not in ("gemma", "forgetful"))
    modelfile = make_modelfile("model-q8_0.gguf", find_pieces(settings, shape, tokenizer), ["<|im_end|>"])
    wanted = [conversation_text(t, settings, shape, tokenizer) for t in turns]
    assert render_in_go(modelfile, turns) == wanted


def test_go_goes_on_with_an_answer_that_was_begun(make_tokenizer):
    """A client may send the beginning of the answer; it follows the prompt of training."""
    for chat_template, data in ((QWEN3, DatasetSettings()), (None, DatasetSettings(template="alpaca"))):
        settings, tokenizer = Settings(dataset=data), make_tokenizer(chat_template)
        modelfile = make_modelfile("model-f16.gguf", find_pieces(settings, SHAPE, tokenizer), [])
        asked = conversations()[1]
        begun = [*asked, Turn("assistant", "It is")]
        assert render_in_go(modelfile, [begun]) == [conversation_text(asked, settings, SHAPE, tokenizer) + "It is"]


def test_a_system_prompt_without_a_place_is_left_out_and_said_so(make_tokenizer):
    settings, tokenizer = Settings(), make_tokenizer(GEMMA, bos="<s>", special=("<end_of_turn>",))
    pieces = find_pieces(settings, SHAPE, tokenizer)
    with_system, without = conversations()[4], conversations()[0]
    assert with_system[0].role == "system" and fill(pieces, with_system) == fill(pieces, without)
    assert "takes no system prompt" in make_modelfile("model-f16.gguf", pieces, [])


def test_what_go_cannot_do_with_contents_is_told(make_tokenizer):
    def notes(chat_template):
        return " ".join(find_pieces(Settings(), SHAPE, make_tokenizer(chat_template, bos="<s>")).notes)

    assert "white space" in notes(LLAMA3) and "thoughts" not in notes(LLAMA3)
    assert "thoughts" in notes(QWEN3) and "white space" not in notes(QWEN3)
    assert notes(CHATML) == ""
    assert "today's date" in notes("{{ strftime_now('%d %b %Y') }}" + CHATML)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages | length }}" + CHATML, "depends on"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "changes or leaves out"),
        (
            CHATML.replace("+ message['content']", "+ (message['content'] | length | string) + message['content']"),
            "changes or leaves out",
        ),
        ("{{ 'X' if messages | length > 10 }}" + CHATML, "put together"),
        ("{{ raise_exception('One question only') if messages | length > 2 }}" + CHATML, "One question only"),
    ],
)
def test_a_template_that_depends_on_something_else_gets_a_reason_and_no_file(make_tokenizer, tmp_path, template, words):
    (tmp_path / "Modelfile.q8_0").write_text("an older one")
    with pytest.raises(ExportError, match=words) as error:
        write_modelfile(tmp_path, "model-q8_0.gguf", Settings(), SHAPE, make_tokenizer(template), ["<|im_end|>"])
    assert str(error.value).startswith("no Modelfile: ") and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_file_names_its_model_and_what_ends_an_answer(tokenizer, tmp_path):
    path = write_modelfile(tmp_path, "model-q4_k_m.gguf", Settings(), SHAPE, tokenizer, ["<|im_end|>", "<|endoftext|>"])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path == tmp_path / "Modelfile.q4_k_m" and "FROM ./model-q4_k_m.gguf" in lines
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]
    with pytest.raises(ExportError, match="end mark"):
        write_modelfile(tmp_path, "model-f16.gguf", Settings(), SHAPE, tokenizer, ["a\nb"])


def test_everything_in_a_template_prints_and_no_text_stands_outside_of_actions(make_tokenizer):
    text = go_template(find_pieces(Settings(), SHAPE, make_tokenizer(NASTY_CHATML)))
    assert '"""' not in text and all(c.isprintable() or c == "\n" for c in text)
    assert go_string('a"b\\\n\t\u3000中') == '"a\\"b\\\\\\n\\t\\U00003000中"'
