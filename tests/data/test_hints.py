"""Every hint of every refusal of data, typed on these very rows: the command gets further."""

import json

import pytest

from sft.config.rules import check_settings
from sft.data.prepare import prepare
from sft.errors import Problem, Refusal
from sft.model.chat_template import CHATML, choose_template, set_variables
from tests.conftest import make_settings
from tests.data.miniatures import REASONING, TOOL, assistant, user
from tests.hints import hints_of, typed

ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('The system role is not known') }}{% endif %}" + CHATML
NO_SYSTEM = CHATML.replace("%}{{", "%}{% if message.role != 'system' %}{{", 1).replace("{% endfor", "{% endif %}{% endfor", 1)
ROLES = (
    "{% for m in messages %}{% if (m.role == 'user') != loop.index0 is even %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ROW = {"instruction": "q", "output": "a"}
TURNS = {"messages": [user("q"), assistant("a")]}
SYSTEM = {"role": "system", "content": "Be brief."}
CALLS = json.dumps([{"name": "get_weather", "arguments": {}}])
GRPO = ["method=grpo", "method.reward_funcs=[ends]"]
ROOM = ["model.max_seq_length=128", "method.max_completion_length=64"]
LONG = {"instruction": "q", "output": "word " * 100}

# (rows, overrides, chat template, what the refusal says)
CASES = {
    "columns of other names": ([{"query": "q", "answers": "a"}], [], CHATML, "fit no known shape"),
    "columns with a context": ([{"question": "q", "context": "c", "answer": "a"}], [], CHATML, "fit no known shape"),
    "columns with a system prompt": ([{"system_prompt": "s", "question": "q", "response": "a"}], [], CHATML, "no known shape"),
    "columns of pairs": ([{"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": []}], [], CHATML, "no known"),
    "turns under another name": ([{"conversation": [user("q"), assistant("a")]}], [], CHATML, "fit no known shape"),
    "an answer under another name": ([{"instruction": "q", "answer": "a"}], [], CHATML, "no column 'output'"),
    "a question in the input column": ([{"input": "q", "response": "a"}], ["dataset.shape=instruction"], CHATML, "no column"),
    "columns in Chinese": ([{"问题": "q", "回答": "a", "id": 1}], [], CHATML, "fit no known shape"),
    "a misspelt column in Chinese": ([{"问题是": "", "output": "a"}], ['dataset.columns.instruction="问题"'], CHATML, "no col"),
    "a column with a space": ([{"Instruction": "q", "out put": "a"}], [], CHATML, "fit no known shape"),
    "a role of no column": ([ROW], ["dataset.columns.output=null"], CHATML, "needs a column for output"),
    "a misspelt column": ([ROW], ["dataset.columns.output=outptu"], CHATML, "no column 'outptu'"),
    "a filter of no column": ([ROW], ["dataset.keep.zzz=a"], CHATML, "no column 'zzz'"),
    "an ignored column that is misspelt": ([{**ROW, "image": "x"}], ["dataset.ignore_columns=[imag]"], CHATML, "no column"),
    "an ignored column of no data": ([ROW], ["dataset.ignore_columns=[zzz]"], CHATML, "no column 'zzz'"),
    "an ignored system prompt": ([{**ROW, "system": "s"}], ["dataset.ignore_columns=[system]"], CHATML, "the role system"),
    "a filter of a misspelt column": ([ROW], ['dataset.keep.outptu="^a b?$"'], CHATML, "no column 'outptu'"),
    "an ignored column that is used": ([ROW], ["dataset.ignore_columns=[output]"], CHATML, "plays the role output"),
    "an answer that is turns": ([{**ROW, "output": [user("q"), assistant("a")]}], [], CHATML, "holds a list"),
    "an answer that is turns, of a set shape": (
        [{**ROW, "output": [user("q"), assistant("a")]}], ["dataset.shape=instruction"], CHATML, "holds a list"),
    "an answer that is a list": ([ROW, {**ROW, "output": ["a", "b"]}], [], CHATML, "holds a list, not text"),
    "a system prompt of no role": ([{**ROW, "system_prompt": "s"}], [], CHATML, "carries meaning"),
    "a context": ([{**ROW, "context": "c"}], [], CHATML, "carries meaning"),
    "a context and images": ([{**ROW, "input": "i", "context": "c", "images": ["x"]}], [], CHATML, "carries meaning"),
    "a context beside what is ignored": (
        [{**ROW, "input": "i", "context": "c", "images": ["x"]}], ["dataset.ignore_columns=[images]"], CHATML, "carries"),
    "a context of a prompt": ([{"prompt": "q", "context": "c", "completion": "a"}], [], CHATML, "carries meaning"),
    "a context beside turns": ([{**TURNS, "context": "c"}], [], CHATML, "carries meaning"),
    "a column of thoughts": ([{**ROW, "cot": "t"}], [], REASONING, "carries meaning"),
    "thoughts in a template text": ([{**ROW, "cot": "t"}], ["dataset.template=alpaca"], REASONING, "carries meaning"),
    "images": ([{**TURNS, "images": ["x.png"]}], [], CHATML, "carries meaning"),
    "a fraction as weight": ([{**ROW, "weight": 0.5}], [], CHATML, "a weight can be 0 or 1"),
    "weights for other turns": ([{**TURNS, "loss_mask": [1, 1, 1]}], [], CHATML, "3 weights for 2 turns"),
    "a fraction as weight of a turn": ([TURNS, {"messages": [user("q"), assistant("a", weight=0.5)]}], [], CHATML, "0 or 1"),
    "history that is no pairs": ([{**ROW, "history": ["q", "a"]}], [], CHATML, "pairs of a question"),
    "history in a template text": ([{**ROW, "history": [["q", "a"]]}], ["dataset.template=alpaca"], CHATML, "no place"),
    "tools that are no functions": ([{**ROW, "tools": ["get_weather"]}], [], CHATML, "tools"),
    "tools in broken JSON": ([{**ROW, "tools": "[{"}], [], CHATML, "as JSON it has a fault"),
    "tools that are a number": ([{**ROW, "tools": [1]}], [], CHATML, "list of functions"),
    "tools in a template text": ([{**ROW, "tools": [TOOL]}], ["dataset.template=alpaca"], REASONING, "no place for tools"),
    "calls that a template leaves out": ([{**ROW, "output": CALLS, "tools": [TOOL]}], [], CHATML, "no place for calls"),
    "thoughts that a template leaves out": (
        [TURNS, {"messages": [user("q"), assistant("a", reasoning_content="t")]}], [], CHATML, "no place for it"),
    "two system prompts": ([{"messages": [SYSTEM, *TURNS["messages"]], "system": "s"}], [], CHATML, "two system prompts"),
    "a system prompt in a template text": (
        [{"messages": [SYSTEM, *TURNS["messages"]]}], ["dataset.template=alpaca"], CHATML, "no place for it"),
    "a system prompt that is refused": ([TURNS], ["dataset.system_prompt=s"], ALTERNATING, "no place for a system prompt"),
    "a system column that is refused": ([{**ROW, "system": "s"}], [], ALTERNATING, "no place for a system prompt"),
    "a system turn that is refused": ([{"messages": [SYSTEM, *TURNS["messages"]]}], [], ALTERNATING, "no place for a system"),
    "a system column that is left out": ([{**ROW, "system": "s"}], [], NO_SYSTEM, "leaves out what a turn says"),
    "a system turn that is left out": ([{"messages": [SYSTEM, *TURNS["messages"]]}], [], NO_SYSTEM, "leaves out what"),
    "two system prompts that are refused": ([{**ROW, "system": "s"}], ["dataset.system_prompt=t"], ALTERNATING, "no place for"),
    "a system prompt that is left out": ([TURNS], ["dataset.system_prompt=s"], NO_SYSTEM, "leaves out what a turn says"),
    "speakers that do not alternate": ([{"messages": [user("q"), user("r"), assistant("a")]}], [], ROLES, "must alternate"),
    "an unknown speaker": ([TURNS, {"messages": [{"role": "robot", "content": "x"}]}], [], CHATML, "unknown speaker"),
    "turns in a template text": (
        [{"messages": [*TURNS["messages"], user("r"), assistant("b")]}], ["dataset.template=alpaca"], CHATML, "one question"),
    "a weight of 0 in a template text": (
        [TURNS, {"messages": [user("q"), assistant("a", weight=0)]}], ["dataset.template=alpaca"], CHATML, "the weight 0"),
    "turns without marks": ([TURNS], ["dataset.template=plain"], CHATML, "Turns need a template"),
    "text in a template": ([{"text": "A text."}], ["dataset.template=alpaca"], CHATML, "used as they stand"),
    "a template of no column": ([ROW], ['dataset.template="Q: {instructon} A: {output}"'], CHATML, "The template can name"),
    "a chat template that is not there": ([ROW], ["dataset.template=chat"], None, "has no chat template"),
    "turns without a chat template": ([TURNS], [], None, "has no chat template"),
    "variables that nobody reads": ([ROW], ["dataset.chat_template_kwargs.enable_thinkin=true"], CHATML, "does not read it"),
    "a misspelt variable": (
        [ROW], ["dataset.chat_template_kwargs.enable_thinkin=true"], "{% if enable_thinking %}{% endif %}" + CHATML, "not re"),
    "a variable of transformers' own": ([ROW], ["dataset.chat_template_kwargs.tools=1"], CHATML, "given to every"),
    "variables without a chat template": ([ROW], ["dataset.chat_template_kwargs.x=1"], None, "no chat template that"),
    "variables of a template text": (
        [ROW], ["dataset.chat_template_kwargs.x=1", "dataset.template=alpaca"], "{% if x %}{% endif %}" + CHATML, "none is"),
    "reasoning of a template text": ([ROW], ["dataset.reasoning=split", "dataset.template=alpaca"], CHATML, "none is used"),
    "a chat template of no file": ([ROW], ["model.chat_template=chatmll"], CHATML, "Neither chatml"),
    "a chat template that is no text": ([ROW], ["model.chat_template=latin.jinja"], CHATML, "file cannot be read"),
    "chat templates without a default": ([ROW], [], {"rag": CHATML, "plain": CHATML}, "none of them is called default"),
    "a variable that is no text": (
        [ROW], ["dataset.chat_template_kwargs.x=inf"], "{% if x %}{% endif %}" + CHATML, "takes texts, numbers"),
    "a pair without its prompt": (
        [{"question": "q", "chosen": "a", "rejected": "b"}], ["method=dpo"], CHATML, "no column for the prompt"),
    "a pair without its rejected answer": (
        [{"prompt": "q", "chosen": "a", "reject": "b"}], ["method=dpo"], CHATML, "needs two answers"),
    "half an emoji": ([ROW, {**ROW, "output": "\ud83d"}], [], CHATML, "half of a character"),
    "an infinite number": ([ROW, {**ROW, "output": float("inf")}], [], CHATML, "infinite number"),
    "rows that are too long": ([ROW, LONG], ["model.max_seq_length=64"], CHATML, "are longer"),
    "rows that are all too long": ([LONG], ["model.max_seq_length=64", "dataset.overlong=drop"], CHATML, "is short enough"),
    "questions that leave no answer": (
        [{"instruction": "word " * 100, "output": "a"}], ["model.max_seq_length=64", "dataset.overlong=truncate"], CHATML,
        "has an answer left"),
    "answers that all lose their thoughts": (
        [{"messages": [user("q"), assistant("<think>\nt\n</think>\n\na"), user("r"), assistant("b", weight=0)]}], [], REASONING,
        "leaves out the reasoning"),
    "answers that all weigh 0 in turns": ([{"messages": [user("q"), assistant("a", weight=0)]}], [], CHATML, "the weight 0"),
    "answers that are all empty": ([{**ROW, "output": ""}], [], CHATML, "all are empty"),
    "answers that all weigh 0": ([{**ROW, "weight": 0}], [], CHATML, "all have the weight 0"),
    "filters that nothing passes": ([ROW], ["dataset.keep.output=zzz"], CHATML, "passes the filters"),
    "no row left to train on": ([ROW], ["dataset.eval_fraction=0.5", "dataset.max_rows=1"], CHATML, "leaves none to train on"),
    "an empty row held out": (
        [ROW, ROW, {**ROW, "output": ""}], ["dataset.eval_fraction=0.1", "dataset.shuffle=false"], CHATML, "held-out rows has"),
    "prompts under another name": ([{"question": "q"}], GRPO, CHATML, "no shape with a prompt"),
    "prompts and answers under other names": ([{"query": "q", "answers": "a"}], GRPO, CHATML, "no shape with a prompt"),
    "a misspelt column of reference answers": (
        [{"prompt": "q", "solution": "a"}], [*GRPO, "dataset.columns.answer=solutoin"], CHATML, "no column 'solutoin'"),
    "a misspelt column of answers to prompts": (
        [{"prompt": "q", "solution": "a"}], [*GRPO, "dataset.columns.completion=solutoin"], CHATML, "no column 'solutoin'"),
    "a context of prompts": ([{"prompt": "q", "context": "c"}], GRPO, CHATML, "carries meaning"),
    "prompts that leave no room": (
        [{"prompt": "word " * 60}, {"prompt": "q"}], [*GRPO, *ROOM], CHATML, "no room for the completion"),
    "prompts that are longer than all": (
        [{"prompt": "word " * 200}, {"prompt": "q"}], [*GRPO, *ROOM], CHATML, "no room for the completion"),
    "prompts that all leave no room": (
        [{"prompt": "word " * 60}], [*GRPO, *ROOM, "dataset.overlong=drop"], CHATML, "leaves room for"),
    "prompts that all weigh 0": ([{"prompt": "q", "weight": 0}], GRPO, CHATML, "all have the weight 0"),
}  # fmt: skip

ADVICE = {"prompts that all weigh 0", "calls that a template leaves out", "answers that all weigh 0 in turns",
          "answers that all weigh 0",
          "answers that are all empty"}  # fmt: skip
"""Cases whose hints are advice alone: only the data, or a file that the reader has, can mend them."""


@pytest.fixture
def problems_of(tmp_path, monkeypatch, make_tokenizer, loaded_tokenizer):
    """`problems_of(argv, chat_template)`: what keeps the rows from being prepared, as a run finds it; [] where nothing does."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def problems(argv: list[str], own: str | None) -> list[Problem]:
        try:
            settings = make_settings(*argv)
            if found := check_settings(settings, hardware=False):
                return found
            template = choose_template(own, settings.model.chat_template, "this model")
            template = set_variables(template, settings.dataset.chat_template_kwargs, "this model")
            prepare(settings, make_tokenizer(template), loaded_tokenizer[1])
        except Refusal as refusal:
            return refusal.problems
        return []

    return problems


@pytest.mark.parametrize("case", CASES)
def test_every_hint_about_data_gets_the_command_further(problems_of, tmp_path, case):
    rows, overrides, template, words = CASES[case]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 2))
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    argv = ["dataset=local", "dataset.path=rows.json", "dataset.eval_fraction=0", *overrides]
    problems = problems_of(argv, template)
    assert any(words in problem.why for problem in problems), problems
    assert any(map(hints_of, problems)) != (case in ADVICE), "nothing of the hints can be typed"
    for problem in problems:
        for hint in hints_of(problem):
            follow(typed(argv, problem, hint), {problem.why}, lambda command: problems_of(command, template))


def follow(argv: list[str], before: set[str], check) -> None:
    """Demand that a command line meets none of the refusals `before`, and that its hints, the first of each, lead on."""
    left = check(argv)
    assert not before & {problem.why for problem in left}, f"{argv} is refused as before: {before}"
    assert len(before) < 5, f"{argv} gets no further after {before}"
    for problem in left[:1]:
        for hint in hints_of(problem)[:1]:
            follow(typed(argv, problem, hint), before | {problem.why}, check)
