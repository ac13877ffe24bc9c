"""Write notebooks/colab.ipynb and notebooks/colab.zh.ipynb: one source of cells, in two languages.

    python scripts/make_notebook.py            write them
    python scripts/make_notebook.py --check    exit 1 if they are out of date

The code is the same in both. The table of steps is the one in docs/from_the_notebook.md. No cell has outputs.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {"en": "colab.ipynb", "zh": "colab.zh.ipynb"}
TABLES = {"en": "from_the_notebook.md", "zh": "from_the_notebook.zh.md"}


@dataclass
class Text:
    """A cell to read."""

    en: str
    zh: str


@dataclass
class Code:
    """A cell to run, and the title that Colab shows over it."""

    en: str
    zh: str
    source: str


CELLS: list[Text | Code] = [
    Text(
        """# Fine-tune Llama 3 on your own data

The steps of Unsloth's Llama 3 notebook, with one command in place of the cells you used to edit. Choose a GPU (Runtime,
Change runtime type), fill in the first cell, and run all cells. The run folder lies on your Google Drive: when the
session ends, run all cells again, and the training goes on from its last checkpoint. It was never run on Colab itself.

Without a GPU the same cells run in small, with a random model that learns nothing: to see that everything works.""",
        """# 用自己的数据微调 Llama 3

步骤与 Unsloth 官方 Llama 3 笔记本相同，只是用一条命令代替原来要修改的单元格。先选择 GPU（代码执行程序，更改运行时类型），
填好第一个单元格，然后运行全部单元格。运行文件夹放在你的 Google Drive 上：会话断开后，再运行一次全部单元格，
训练就会从最后一个检查点继续。本笔记本尚未在 Colab 上实际运行过。

没有 GPU 时，同样的单元格会以很小的规模运行，用的是随机初始化、学不到东西的模型：只用来确认一切正常。""",
    ),
    Code(
        "What to train",
        "训练设置",
        """MODEL = "llama3_8b"  # @param ["llama3_8b", "llama3_1_8b_instruct", "llama3_2_3b_instruct", "qwen3_4b", "qwen3_8b", \
"qwen2_5_7b_instruct", "gemma3_4b_it", "mistral_7b"] {allow-input: true}
DATASET = "ruozhiba"  # @param ["ruozhiba", "alpaca_zh", "alpaca_cleaned", "twists"] {allow-input: true}
MORE = "trainer.max_steps=60 trainer.save_steps=15"  # @param {type: "string"}
NAME = "first"  # @param {type: "string"}
QUESTION = "月亮上能打伞吗？"  # @param {type: "string"}
EXPORT = "gguf export.gguf.quantizations=[q4_k_m]"  # @param ["adapter", "merged_16bit", "merged_4bit", \
"gguf export.gguf.quantizations=[q4_k_m]", "all"] {allow-input: true}
HUB = ""  # @param {type: "string"}
DRIVE = True  # @param {type: "boolean"}
PROJECT = ""  # @param {type: "string"}""",
    ),
    Text(
        """`MORE` takes any further overrides, with a space between them; the table at the end has those that the cells of
Unsloth's notebook stand for. `NAME` is the run's folder: another name is another run. `EXPORT` as it stands makes one GGUF
file of 4.9 GB, which a free Drive holds. `HUB` is a repository such as `me/my-model`, or empty. Without `DRIVE` a run is lost
with its session. `PROJECT` is the git address of this project; beside a clone it stays empty.""",
        """`MORE` 里可以写任意其他设置，用空格隔开；Unsloth 笔记本的单元格对应哪些设置，见文末的表。
`NAME` 是这次运行的文件夹名：换一个名字就是另一次运行。`EXPORT` 的默认值只生成一个 4.9 GB 的 GGUF 文件，免费的 Drive 放得下。
`HUB` 是要上传到的仓库，例如 `me/my-model`，也可以留空。
不勾选 `DRIVE`，会话结束后运行结果会丢失。`PROJECT` 是本项目的 git 地址；已经克隆好时留空。""",
    ),
    Text(
        """## Where it runs

With a GPU in Colab the Drive is connected, which asks for your permission. The cells below follow from `GPU`. Secrets of
Colab (the key on the left) or Kaggle are used where they are: `WANDB_API_KEY`, without which curves are kept offline, and
`HF_TOKEN`, for gated models and pushes. They are never written to a file or a command.""",
        """## 在哪里运行

在 Colab 里有 GPU 时会连接 Drive，需要你的许可。后面的单元格会根据 `GPU` 的值自动调整。如果在 Colab（左侧的“密钥”）或 Kaggle
里保存了密钥，就会使用：`WANDB_API_KEY`（没有时曲线离线保存）和 `HF_TOKEN`（下载需要许可的模型、上传时使用）。
密钥不会被写进任何文件或命令。

在国内的平台（AutoDL、魔搭等）上，请先另建一个单元格运行 `import os; os.environ["HF_ENDPOINT"] = "https://hf-mirror.com"`。""",
    ),
    Code(
        "Look at the machine",
        "查看机器",
        """import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

GPU = shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"]).returncode == 0
COLAB, KAGGLE = "google.colab" in sys.modules, "KAGGLE_KERNEL_RUN_TYPE" in os.environ
RUNS, PYTHON, CUT = "outputs", sys.executable, ""
if GPU and COLAB and DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    RUNS = "/content/drive/MyDrive/sft"
if not GPU:
    MODEL, DATASET, EXPORT = "tiny_random", "twists", "adapter"
    MORE = "trainer=debug dataset.max_rows=24 samples.num_held_out=2 samples.max_new_tokens=8 tracking=none"
    CUT = "trainer.max_hours=0.0001"
RUN = f"{RUNS}/{NAME}"


def use_secret(name):
    \"\"\"Put a secret of Colab or Kaggle into the environment, if there is one that may be read.\"\"\"
    try:
        if COLAB:
            from google.colab import userdata

            os.environ[name] = userdata.get(name)
        elif KAGGLE:
            from kaggle_secrets import UserSecretsClient

            os.environ[name] = UserSecretsClient().get_secret(name)
    except Exception as error:
        print(f"There is no secret {name}: {type(error).__name__}")


def status():
    \"\"\"What the run folder says of the run: finished, stopped, running, failed, or none.\"\"\"
    record = Path(RUN, "run.json")
    return json.loads(record.read_text(encoding="utf-8"))["status"] if record.is_file() else "none"


for name in ("WANDB_API_KEY", "HF_TOKEN"):
    use_secret(name)
print(f"model={MODEL} dataset={DATASET} {MORE}")
print(f"run folder {RUN}, status {status()}")""",
    ),
    Text(
        """## Install

This takes some minutes in each session. The packages go into an environment of their own, so that those of the platform
stay as they are. Where torch cannot reach the GPU, the cell ends here and says what to do.""",
        """## 安装

每次新会话都要重新安装，大约几分钟。所有软件包装进单独的环境，不改动平台自带的包。
如果 torch 用不了 GPU，会在这里停下并说明办法。""",
    ),
    Code(
        "Install",
        "安装",
        """if not Path("train.py").is_file() and Path("../train.py").is_file():
    os.chdir("..")
ENV = Path("/content/env" if COLAB else Path.home() / "sft-env")
INSTALL = COLAB or ENV.is_dir() or not Path("train.py").is_file()
if not Path("train.py").is_file():
    assert PROJECT, "Write the git address of this project into PROJECT, in the first cell."
    if not Path("sft-lora").is_dir():
        !git clone --quiet {PROJECT} sft-lora
    os.chdir("sft-lora")
if INSTALL:
    PYTHON = f"{ENV}/bin/python"
    WHAT = ".[unsloth]" if GPU else "."
    !pip install --quiet uv
    !uv venv --quiet --allow-existing --seed --python 3.12 {ENV}
    !uv pip install --quiet --python {PYTHON} --editable "{WHAT}"
    assert _exit_code == 0, "The install failed: see above."
    if GPU:
        !{PYTHON} -c "import torch; assert torch.cuda.is_available()"
        OLDER = f"!uv pip install --python {PYTHON} --torch-backend=auto --reinstall-package torch torch==2.13.0"
        assert _exit_code == 0, f"torch cannot use the GPU: its driver is too old for CUDA 13. Run this and go on: {OLDER}"
    if EXPORT.split()[0] in ("gguf", "all"):
        !{PYTHON} scripts/install_gguf.py
        assert _exit_code == 0, "The install of llama.cpp's parts failed: see above."
else:
    print("This project is here already; nothing is installed.")""",
    ),
    Text(
        """## Look before you train

The first rows as the model will see them, what is trained on, whether it fits the GPU, how long it takes. A mistake is told
here, with what to type instead.""",
        """## 训练前检查

显示前几条样本送进模型时的实际文本、哪些 token 参与训练、显存是否够用、需要多久。写错了的设置会在这里指出，并附上正确写法。""",
    ),
    Code(
        "Check",
        "检查",
        """!{PYTHON} train.py model={MODEL} dataset={DATASET} {MORE} preflight.mode=only
assert _exit_code == 0, "Refused: see above for what to change." """.rstrip(),
    ),
    Text(
        """## Train

One command. If you interrupt it, the next cell goes on from the last checkpoint. On a machine without a GPU it is stopped
after the first step, as if the session had ended, so that the next cell has something to go on with.""",
        """## 训练

一条命令。如果中断了它，下一个单元格会从最后一个检查点继续。没有 GPU 时，第一步之后就会停下，相当于会话断开，
这样下一个单元格才有东西可以继续。""",
    ),
    Code(
        "Train",
        "训练",
        """if status() != "finished":
    !{PYTHON} train.py model={MODEL} dataset={DATASET} {MORE} hydra.run.dir={RUN} {CUT}
    assert _exit_code == 0, "It did not end well: see above."
print(status())""",
    ),
    Text(
        """## When the session has ended

Run all cells again: the same command finds its run folder on the Drive and goes on from the last checkpoint
(`trainer.save_steps`). A run that is finished is left as it is. The Drive gets its files with a delay, so a session that is
cut may lose the last minutes; a checkpoint that arrived in part is noticed and left out.""",
        """## 会话断开之后

再运行一次全部单元格：同一条命令会在 Drive 上找到运行文件夹，从最后一个检查点（`trainer.save_steps`）继续。
已经完成的运行不会改动。文件写入 Drive 有延迟，所以突然断开可能丢掉最后几分钟；没有写完整的检查点会被发现并跳过。""",
    ),
    Code(
        "Go on",
        "继续",
        """if status() != "finished":
    !{PYTHON} train.py model={MODEL} dataset={DATASET} {MORE} hydra.run.dir={RUN}
    assert _exit_code == 0, "It did not end well: see above."
print(status())""",
    ),
    Text(
        """## Curves and completions

The held-out loss is measured on rows that are not trained on. The completions are those to the same questions before and
after training; one that was cut off ends in dots. Below them is the report, `report.html` of the run folder.""",
        """## 曲线和回答

留出集（验证集）loss 是在没有参与训练的数据上测的。下面是同一批问题在训练前后的回答；被截断的回答以省略号结尾。
最下面是完整的报告，即运行文件夹里的 `report.html`。""",
    ),
    Code(
        "Show",
        "查看",
        """import html

from IPython.display import HTML, Image, display

!{PYTHON} scripts/show_run.py run={RUN}
assert _exit_code == 0
display(Image(f"{RUN}/curves.png"))
REPORT = html.escape(Path(RUN, "report.html").read_text(encoding="utf-8"))
display(HTML(f'<div><iframe srcdoc="{REPORT}" width="100%" height="800"></iframe></div>'))""",
    ),
    Text(
        """## Talk to it

One question, through the template of the training. Add `against=base` for the completion of the model before training
beside it; leave `prompt=` out in a terminal to have a conversation.""",
        """## 对话

问一个问题，使用训练时的模板。加上 `against=base`，可以同时看到训练前模型的回答；在终端里去掉 `prompt=` 就可以连续对话。""",
    ),
    Code(
        "Ask",
        "提问",
        """!{PYTHON} scripts/chat.py run={RUN} max_new_tokens={200 if GPU else 8} prompt={shlex.quote(QUESTION)}
assert _exit_code == 0""",
    ),
    Text(
        """## Export

Each export is loaded afresh and compared with the model that was trained: the loss, the completions, what ends them. One
that drifted is named.""",
        """## 导出

每个导出都会重新加载，与训练出来的模型比较 loss、回答和结束符。未通过验证的导出会被明确标出。""",
    ),
    Code(
        "Export",
        "导出",
        """!{PYTHON} scripts/export.py run={RUN} export={EXPORT}
assert _exit_code == 0, "An export does not hold: see above."
print(*sorted(str(file) for file in Path(RUN, "export").rglob("*") if file.is_file()), sep="\\n")""",
    ),
    Text(
        """## Push to the Hub

Fill in `HUB` in the first cell, and put a token of the type "write" into the secrets under the name `HF_TOKEN`.
Repositories are private unless you add `export.hub.private=false`.""",
        """## 上传到 Hub

在第一个单元格里填写 `HUB`，并在密钥里添加一个有写权限的 token，名称为 `HF_TOKEN`。
仓库默认是私有的，加上 `export.hub.private=false` 才会公开。""",
    ),
    Code(
        "Push",
        "上传",
        """if HUB and GPU:
    assert os.environ.get("HF_TOKEN") or not (COLAB or KAGGLE), "Put a token into the secrets under the name HF_TOKEN."
    !{PYTHON} scripts/export.py run={RUN} push=true export.hub.repo={HUB}
    assert _exit_code == 0, "Not everything was pushed: see above."
else:
    print("Nothing is pushed:", "HUB is empty." if GPU else "without a GPU the model is only a test.")""",
    ),
    Text(
        """## The end

Everything is in the run folder. The Drive gets large files some minutes later: leave the session open until they are there.

## The steps of Unsloth's notebook

{table}""",
        """## 结束

所有文件都在运行文件夹里。大文件写入 Drive 需要几分钟，请等写完再关闭会话。

## Unsloth 笔记本的步骤

{table}""",
    ),
]


def main(argv: list[str]) -> int:
    """Write the notebooks, or with `--check` compare them; returns the exit code."""
    for language, name in LANGUAGES.items():
        target, made = ROOT / "notebooks" / name, make_notebook(language)
        if "--check" not in argv:
            target.write_text(made, encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != made:
            print(f"notebooks/{name} is out of date: python scripts/make_notebook.py", file=sys.stderr)
            return 1
    return 0


def make_notebook(language: str) -> str:
    """The notebook in one language, as the text of its file."""
    table = read_table(ROOT / "docs" / TABLES[language])
    cells = []
    for number, cell in enumerate(CELLS):
        text = getattr(cell, language)
        if isinstance(cell, Code):
            source = f'# @title {text} {{ display-mode: "form" }}\n{cell.source}' if number == 1 else f"# {text}\n{cell.source}"
            cells.append(_cell("code", number, source) | {"execution_count": None, "outputs": []})
        else:
            joined = re.sub(
                r"(?<=[，。；：！？、])\n(?=\w|`)", "", text
            )  # Chinese has no spaces, so a line break must not become one
            cells.append(_cell("markdown", number, joined.replace("{table}", table)))
    notebook = {
        "cells": cells,
        "metadata": {
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def read_table(page: Path) -> str:
    """The first table of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|"))
    end = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
    return "\n".join(lines[start:end])


def _cell(kind: str, number: int, source: str) -> dict:
    return {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}, "source": source.splitlines(keepends=True)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
