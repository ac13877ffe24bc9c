"""Every setting of a run: its name, type, default and meaning. Imports nothing heavy.

The docstring under a field is its only documentation: `docs/settings.md` is generated from here by
`python scripts/settings_table.py`. Names are upstream's own (PEFT, TRL, transformers) wherever upstream has one.
"""

import ast
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sft.paths import ASSETS


class Backend(Enum):
    """Which library loads and patches the model."""

    auto = "auto"
    unsloth = "unsloth"
    transformers = "transformers"


class Dtype(Enum):
    """Number format of the weights that are not quantised."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(Enum):
    """Attention kernel, under transformers' names."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class Shape(Enum):
    """How a row of the data is laid out."""

    auto = "auto"
    instruction = "instruction"
    prompt_completion = "prompt_completion"
    conversations = "conversations"
    messages = "messages"
    text = "text"


class LossOn(Enum):
    """Which tokens are trained on."""

    answer = "answer"
    last = "last"
    all = "all"


class Reasoning(Enum):
    """What becomes of an answer whose reasoning the chat template leaves out, as templates do in earlier turns."""

    template = "template"
    split = "split"
    keep = "keep"
    strip = "strip"


class ControlTokens(Enum):
    """What control tokens such as `<|im_end|>` become that stand in a question, a system prompt or a result."""

    text = "text"
    keep = "keep"


class Overlong(Enum):
    """What happens to a row that is longer than `model.max_seq_length`."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


class Bias(Enum):
    """Which bias terms LoRA trains, under PEFT's names."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class MethodName(Enum):
    """What a model learns from."""

    sft = "sft"
    dpo = "dpo"
    grpo = "grpo"


class MethodLoss(Enum):
    """The loss of a pair of answers (dpo), or of a group of completions (grpo), under TRL's names."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    apo_zero = "apo_zero"
    sigmoid_norm = "sigmoid_norm"
    dapo = "dapo"
    dr_grpo = "dr_grpo"
    grpo = "grpo"
    bnpo = "bnpo"


class ScaleRewards(Enum):
    """What the advantages of completions are divided by, under TRL's names."""

    group = "group"
    batch = "batch"
    none = "none"


class Reference(Enum):
    """The model that preferences are measured against."""

    start = "start"
    base = "base"


class TrackerName(Enum):
    """Where curves and samples go besides the run folder."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    mlflow = "mlflow"
    swanlab = "swanlab"
    trackio = "trackio"
    none = "none"


class TrackingMode(Enum):
    """How a tracker's server is reached."""

    auto = "auto"
    online = "online"
    offline = "offline"


# What a sweep does after a job that failed. Made by a call, because `continue` cannot be written as a name in a class.
OnFailure = Enum("OnFailure", [("continue", "continue"), ("stop", "stop")], module=__name__)


class Isolation(Enum):
    """Where the jobs of a sweep run."""

    shared = "shared"
    process = "process"


class PreflightMode(Enum):
    """What is done before a weight is loaded."""

    run = "run"
    only = "only"
    skip = "skip"


class Language(Enum):
    """Language of report.html."""

    en = "en"
    zh = "zh"


class Gpu(Enum):
    """GPUs whose memory is known without having one."""

    t4 = "t4"
    l4 = "l4"
    a100_40 = "a100_40"
    a100_80 = "a100_80"
    h100 = "h100"
    h200 = "h200"


class Strategy(Enum):
    """How several processes share a run."""

    ddp = "ddp"
    fsdp = "fsdp"


@dataclass
class ModelSettings:
    """The model that is fine-tuned, and how it is loaded."""

    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id or local folder of the model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest and records its commit in `run.json`."""
    backend: Backend = Backend.auto
    """`unsloth`, `transformers`, or `auto`. On a GPU with both: transformers where batches can be padding-free and the weights
    leave room for them, which is faster; else Unsloth, which needs less memory."""
    max_seq_length: int = 2048
    """Longest row in tokens. Longer ones follow `dataset.overlong`; nothing is cut in silence."""
    dtype: Dtype = Dtype.auto
    """Number format of weights and computations. `auto`: bfloat16 on a GPU that has it, else float16; float32 on the CPU.
    Where all weights are trained (`lora=none`) `auto` keeps them in float32."""
    load_in_4bit: bool = False
    """Load the frozen weights as 4-bit nf4 (QLoRA): a quarter of the memory, slower. Needs a GPU."""
    load_in_8bit: bool = False
    """Load the frozen weights as 8-bit integers. Needs a GPU."""
    load_in_fp8: bool = False
    """Round the frozen weights to FP8, 8-bit floating-point numbers, and what they are multiplied with: half the memory of 16
    bits, and faster. Needs a GPU of compute capability 8.9 or higher (L4, RTX 4090, H100)."""
    chat_template: str | None = None
    """Replaces the tokenizer's chat template: `chatml`, a file with Jinja text, or the Jinja text itself."""
    attn_implementation: Attention = Attention.auto
    """Attention kernel; `auto` leaves the choice to the backend."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, on this machine and with your rights; without it such a model is refused.
    Only for repositories you have read. Said anew beside `resume=` and by whoever chats with such a run or exports it."""


@dataclass
class ColumnSettings:
    """Which column of the data plays which role. null leaves the role blank."""

    instruction: str | None = "instruction"
    """The task or question."""
    input: str | None = "input"
    """Further context for the instruction; may be missing from the data."""
    output: str | None = "output"
    """The answer to learn, for the instruction shape."""
    prompt: str | None = "prompt"
    """The prompt, for the prompt/completion shape."""
    completion: str | None = "completion"
    """The answer to learn, for the prompt/completion shape."""
    conversations: str | None = "conversations"
    """ShareGPT turns: a list of `from` and `value`."""
    messages: str | None = "messages"
    """OpenAI turns: a list of `role` and `content`."""
    text: str | None = "text"
    """A whole text, trained on as it stands."""
    system: str | None = "system"
    """A system prompt of the row's own; may be missing from the data."""
    tools: str | None = "tools"
    """Functions that the model can call, for the chat template: a list or JSON text; may be missing."""
    history: str | None = "history"
    """Earlier turns of an Alpaca row: pairs of a question and an answer, read and not trained on; may be missing."""
    chosen: str | None = "chosen"
    """The better answer, for `method=dpo`: a text, turns, or the whole conversation."""
    rejected: str | None = "rejected"
    """The worse answer, in the same form."""
    answer: str | None = "answer"
    """The reference answer that rewards compare with, for `method=grpo` and rows without an answer to learn; may be missing."""
    reasoning: str | None = "reasoning_content"
    """What was thought before the answer, where it has a column of its own; may be missing."""


@dataclass
class DatasetSettings:
    """The data, how a row becomes text, and which tokens are trained on."""

    name: str | None = "twists"
    """Hub id of the data set, or `twists`, the set that ships with the project."""
    config_name: str | None = None
    """Configuration (subset) of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin one to make a run repeatable."""
    split: str = "train"
    """Split of a hub data set or of a `save_to_disk` folder to train on."""
    path: Any = None
    """In place of `dataset.name`: a json, jsonl, csv, parquet or arrow file, also `.jsonl.gz` and the like; a folder of such
    files, or one of `save_to_disk`; a glob; or a list of these, `[a.jsonl,b.jsonl]`."""
    format: str | None = None
    """A function of your own, `file.py:function`, that makes of each row of the file a list of messages, or a row of one of the
    shapes. Filters, columns and templates are given what it returns."""
    shape: Shape = Shape.auto
    """How a row is laid out; `auto` goes by the columns and says what it found."""
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    """Which column plays which role."""
    template: str = "auto"
    """`chat` (the tokenizer's chat template), `alpaca`, `plain`, or a text with `{instruction}`, `{input}`,
    `{output}` and other columns in braces, where a typed `\\n` is a line break. `auto`: the chat template where the
    tokenizer has one, else `alpaca`."""
    system_prompt: str | None = None
    """System prompt for rows that bring none."""
    loss_on: LossOn = LossOn.answer
    """Train on the `answer` (every assistant turn and its end mark), on the `last` of a row alone, or on `all` of the text."""
    reasoning: Reasoning = Reasoning.template
    """For answers whose reasoning the chat template leaves out. `template`: read, not trained on. `split`: the row becomes one
    sample an answer, each with its reasoning. `keep`: it is written into the row all the same. `strip`: no answer keeps any."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `{enable_thinking: false}`; they are set at its head, also in what is saved."""
    special_tokens_in_text: ControlTokens = ControlTokens.text
    """Control tokens in what is not an answer are read as plain `text`, or as control tokens (`keep`)."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns that carry meaning (`system_prompt`, `context`, `images`, ...) and are left out all the same."""
    skip_bad_rows: bool = False
    """Leave rows out that cannot be trained on, and count them; else they are refused."""
    keep: dict[str, str] = field(default_factory=dict)
    """Keep only rows whose column, as JSON text if it is not a text, matches: `dataset.keep={output: ".{20,}"}`."""
    drop: dict[str, str] = field(default_factory=dict)
    """Drop rows whose column matches the regular expression: `dataset.drop={output: "(?i)as an ai"}`."""
    shuffle: bool = True
    """Shuffle the rows (by `dataset.seed`) before `max_rows` and the held-out rows are taken."""
    seed: int | None = None
    """Seed of the shuffling, and so of which rows are held out; null follows `seed`. Set it to compare several seeds on the
    same held-out rows."""
    max_rows: int | None = None
    """Use at most this many rows, those that `eval_fraction` holds out included."""
    eval_fraction: float = 0.1
    """Share of the rows held out for the evaluation loss; 0 holds none out. Has no effect beside `eval_path`."""
    eval_path: Any = None
    """Held-out rows of their own, in place of `eval_fraction`: whatever `path` takes. Columns, template and filters are those
    of the other rows."""
    eval_split: str | None = None
    """Split of a hub data set or of a `save_to_disk` folder to evaluate on, in place of `eval_fraction`."""
    max_eval_rows: int | None = 200
    """Evaluate on at most this many held-out rows. Under `eval_fraction` the rest of them are trained on."""
    overlong: Overlong = Overlong.error
    """Rows over `model.max_seq_length`: `error` refuses and counts them, `drop` leaves them out, `truncate` cuts
    their end, which loses the answer's end mark."""


@dataclass
class LoraSettings:
    """The adapter, under PEFT's names."""

    enabled: bool = True
    """false trains every weight of the model (full fine-tuning)."""
    r: int = 16
    """Rank of the adapter's matrices."""
    lora_alpha: float = 16
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout before the adapter, 0 to 1. Unsloth is faster at 0."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers that get an adapter, or regular expressions over their whole names, as PEFT matches them:
    `[".*self_attn.*"]`; `[all-linear]` for every one of them. Where it is not set, families that name their layers otherwise
    get their own."""
    bias: Bias = Bias.none
    """Which bias terms are trained."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train the weights' magnitude apart from their direction (DoRA): slower, sometimes better at low rank."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full beside the adapter, such as `[embed_tokens, lm_head]`."""
    start_from: str | None = None
    """Adapter to train further: a run folder, an adapter folder or a hub id. Rank, targets and model have to be its own."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else PEFT's LoraConfig takes: `lora.extra.layers_to_transform=[0,1]`; and `loraplus_lr_ratio`. Names and types
    are checked before the start."""


@dataclass
class MethodSettings:
    """What the model is trained on: answers (`sft`), preferences between two answers (`dpo`), or rewards of its own answers
    (`grpo`). Names are TRL's."""

    name: MethodName = MethodName.sft
    """`sft`, `dpo` or `grpo`; chosen by `method=dpo` or `method=grpo`, which also choose a data set and a learning rate."""
    beta: float = 0.1
    """DPO: how strongly the model is held to the reference; larger stays closer. GRPO: weight of the KL divergence from the
    reference; `method=grpo` has 0, which needs none."""
    loss_type: MethodLoss = MethodLoss.sigmoid
    """DPO: the loss of a pair, the first six. GRPO: that of a step's completions, the last four; `method=grpo` has `dapo`."""
    label_smoothing: float = 0.0
    """DPO with `loss_type=robust`: share of the pairs that may be labelled the wrong way round, 0 to 0.5."""
    sft_weight: float = 0.0
    """DPO: adds the chosen answers' own loss, a mean over their tokens, times this."""
    reference: Reference = Reference.start
    """The model that pairs (DPO) or completions (GRPO with `beta` above 0) are measured against. `start`: the one that the run
    begins with, with the adapter of `lora.start_from`; `base`: the one without any adapter."""
    num_generations: int = 8
    """GRPO: completions of each prompt, a group; at least 2. Batch sizes count prompts."""
    max_completion_length: int = 256
    """GRPO: longest completion in tokens. Prompt and completion have room in `model.max_seq_length`."""
    temperature: float = 1.0
    """GRPO: temperature that completions are sampled with; above 0."""
    reward_funcs: list[str] = field(default_factory=list)
    """GRPO: what a completion is rewarded for: `number`, `exact`, `contains`, `regex`, `json_schema`, `ends`, `length`,
    `repetition`, `format`, or a function of your own, `file.py:function`."""
    reward_weights: list[float] = field(default_factory=list)
    """GRPO: weight of each reward, in the order of `reward_funcs`; empty: 1 each."""
    reward_options: dict[str, Any] = field(default_factory=dict)
    """GRPO: options of shipped rewards by name: `{length: {words: 40}}`."""
    scale_rewards: ScaleRewards = ScaleRewards.group
    """GRPO: the standard deviation that advantages are divided by: that of the completions of a prompt (`group`), of a step
    (`batch`), or `none`."""
    epsilon: float = 0.2
    """GRPO: a token's ratio of probabilities counts down to 1 - epsilon. Has no effect with one update a rollout."""
    epsilon_high: float | None = None
    """GRPO: and up to 1 + this; null: `epsilon`."""
    num_iterations: int = 1
    """GRPO: updates with the completions of a rollout."""
    mask_truncated_completions: bool = False
    """GRPO: leave completions that did not end within `max_completion_length` out of the loss."""
    max_idle_steps: int = 20
    """GRPO: after so many steps in a row in which no group's rewards differ, the run ends as failed."""


@dataclass
class TrainerSettings:
    """How the model is trained, under TRL's and transformers' names."""

    num_train_epochs: float = 1.0
    """Epochs: how often each training row is used."""
    max_steps: int = -1
    """Stop after this many optimiser steps; above 0 it replaces `num_train_epochs`."""
    per_device_train_batch_size: int | str = "auto"
    """Rows in one micro-batch. `auto`: the most, up to `effective_batch_size`, that an estimate of the GPU's memory allows,
    or fewer where a padding-free run is faster with fewer layers recomputed; 2 on the CPU."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches in one optimiser step, beside a number of rows in each. null: what `effective_batch_size` asks for, else
    4."""
    effective_batch_size: int | None = None
    """Rows in one optimiser step, in however many micro-batches. null: 8 for `auto`, else the product of the two."""
    per_device_eval_batch_size: int | None = None
    """Rows in one micro-batch of the evaluation. null: 4; padding-free on a GPU, as many as have 8,192 tokens."""
    learning_rate: float = 2e-4
    """Peak learning rate. LoRA usually wants 1e-4 to 1e-3; 3e-3 mostly diverges."""
    lr_scheduler_type: str = "linear"
    """Schedule after the warm-up: linear, cosine, constant_with_warmup ..."""
    warmup_steps: float = 5
    """Steps of rising learning rate; below 1 a share of all steps."""
    optim: str = "adamw_torch"
    """Optimiser. adamw_8bit saves memory and needs a GPU."""
    weight_decay: float = 0.01
    """Decay of the trained weights a step."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool | None = None
    """Recompute activations to save memory, at about a third more time. null: where the memory estimate calls for it, and with
    a fixed number of rows a micro-batch through Unsloth; never on the CPU."""
    padding_free: bool | None = None
    """Concatenate the rows of a micro-batch instead of padding them: the same losses, no time for padding. null: where the
    backend is `transformers` and the model's attention allows it; Unsloth has a way of its own."""
    torch_compile: bool | None = None
    """Compile the decoder layers: about a third less time a step, after one to two minutes at the start that the next run finds
    on the disk. null: on a GPU, in runs that are long enough to repay it."""
    cuda_graphs: bool | None = None
    """Capture micro-batches of usual lengths as CUDA graphs and replay them, so that a small one does not wait for the host.
    null: on a GPU, where batches are padding-free, without dropout."""
    max_memory_gib: float | None = None
    """GPU memory that the run may take, in GiB, on each GPU: what has no room is cut smaller, recomputed or refused as on a GPU
    of that size. null: all there is."""
    logging_steps: int = 1
    """Write a line of metrics every so many steps."""
    eval_steps: float | None = None
    """Evaluate every so many steps; below 1 a share of all steps. Always before the first and after the last step. null: at
    every quarter, or not in between where that would be more than a tenth of the training's work and nothing stops early."""
    save_steps: float = 0.25
    """Save a checkpoint every so many steps; below 1 a share of all steps."""
    save_total_limit: int = 2
    """Keep at most this many checkpoints, the best one among them."""
    load_best_model_at_end: bool = True
    """Keep the weights with the lowest evaluation loss, not the last ones. Has no effect without evaluations between the first
    step and the last."""
    early_stopping_patience: int | None = None
    """Stop when the evaluation loss did not fall in this many evaluations; null never stops early."""
    early_stopping_threshold: float = 0.0
    """A fall smaller than this does not count as one."""
    max_hours: float | None = None
    """Stop after this many hours, with the time for the last evaluation, for saving and for the exports taken off; the same
    command goes on later. null has no limit."""
    stop_at: str | None = None
    """The same by the clock: `"17:30"`, the next time it is that late here, or `"2026-12-31 17:30"`."""
    max_bad_steps: int = 10
    """A step whose loss or gradient is not a finite number is skipped and counted; one more of them than this ends the
    run."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else TRL's SFTConfig takes: `trainer.extra.neftune_noise_alpha=5`. Names are checked before the start."""


@dataclass
class SamplesSettings:
    """Completions generated greedily from fixed prompts while the model learns."""

    num_held_out: int = 8
    """How many prompts to take from the held-out rows, Chinese and other ones in turn and of all lengths (from the training
    rows where none are held out)."""
    prompts: list[str] = field(default_factory=list)
    """Questions of your own, put through the data's template."""
    every_steps: float | None = None
    """Generate every so many steps; below 1 a share of all steps. Always before the first and after the last step. null:
    half-way too, in runs of at least twice as many steps as `samples.max_new_tokens`."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""


@dataclass
class HubSettings:
    """Where the exports are pushed to."""

    repo: str | None = None
    """Repository on the hub, `user/name`, for the merged model; the adapter goes to `user/name-LoRA`, the 4-bit model to
    `user/name-bnb-4bit` and GGUF files to `user/name-GGUF`. null pushes nothing."""
    private: bool = True
    """Whether repositories are made private. One that is public already is refused while this is true."""


@dataclass
class GgufSettings:
    """Which GGUF files are made for llama.cpp and Ollama."""

    quantizations: list[str] = field(default_factory=lambda: ["q8_0", "q4_k_m"])
    """llama.cpp's types by name: f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m ... The merged f16 is made once for all of them."""
    adapter: bool = False
    """The adapter alone as a small GGUF file too, to put on a GGUF of the base model: `llama-cli --lora`."""


@dataclass
class ExportSettings:
    """What is made of the adapter after training, and how it is proven. The adapter itself is always saved."""

    formats: list[str] = field(default_factory=list)
    """Any of `adapter`, `merged_16bit`, `merged_4bit`, `gguf`; each is written to `export/<format>/` in the run folder."""
    gguf: GgufSettings = field(default_factory=GgufSettings)
    """Which GGUF files are made."""
    num_prompts: int = 8
    """Greedy completions compared between each export and the model that was trained."""
    max_loss_increase: float = 0.1
    """A quantised export whose held-out loss is higher than the trained model's by more than this (in nats a token) has
    failed. Lossless ones have a fixed, much smaller limit."""
    hub: HubSettings = field(default_factory=HubSettings)
    """Where the exports are pushed to."""


@dataclass
class TrackingSettings:
    """Where the run is tracked besides its own folder."""

    tracker: TrackerName = TrackerName.wandb
    """`wandb`, `tensorboard`, `mlflow`, `swanlab`, `trackio`, or `none` for the run folder alone."""
    trackers: list[str] = field(default_factory=list)
    """Several at once, in place of `tracker`: `[wandb,tensorboard]`."""
    mode: TrackingMode = TrackingMode.auto
    """`auto`: as WANDB_MODE or the tracker's own settings say, else online with an API key (MLflow: MLFLOW_TRACKING_URI)
    and a network, else offline with one line on how to sync. `online`, here or in WANDB_MODE: a refusal where that cannot
    be had."""
    project: str | None = None
    """Project, or MLflow's experiment; null is that of the tracker's own settings (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME,
    SWANLAB_PROJECT_NAME, W&B's settings file), else `sft`."""
    entity: str | None = None
    """W&B user or team, or SwanLab's workspace; null is WANDB_ENTITY or that of W&B's settings file, else the account's
    default."""
    name: str | None = None
    """Name of the run; null is WANDB_NAME, else one of the model, the data and what was overridden, with the run's id."""
    tags: list[str] = field(default_factory=list)
    """Tags beside those of WANDB_TAGS, the names of the chosen groups, the backend and the GPU."""
    group: str | None = None
    """Group of the run; null is WANDB_RUN_GROUP, in a sweep its folder's name."""
    notes: str | None = None
    """Notes on the run; null is WANDB_NOTES, else its command."""
    alert: bool = False
    """Have W&B send an alert when the run ended, with its status and why; Trackio shows it."""
    log_adapter: bool = False
    """Send the adapter to W&B at the end, as an artifact. Nothing else sends weights there."""


@dataclass
class SweepSettings:
    """How the jobs of a sweep are run. Without effect on what a job learns, and on a single run."""

    on_failure: OnFailure = OnFailure["continue"]
    """After a job that failed or diverged: `continue` with the others, or `stop`."""
    isolation: Isolation = Isolation.shared
    """`shared`: all jobs in one process, with model and data loaded once. `process`: each job in a process of its own, so
    that a job which is killed is only a row in the table."""
    paired: list[str] = field(default_factory=list)
    """Swept settings whose values go together, first with first, instead of every combination:
    `sweep.paired=[lora.r,lora.lora_alpha]`."""


@dataclass
class DistributedSettings:
    """Several processes for one run, one a GPU. Without effect on what the model learns: a step has the same rows."""

    num_processes: int | str = 1
    """Processes on this machine, which train.py starts; `auto`: one for each GPU. Under a torchrun of your own
    leave it alone."""
    strategy: Strategy = Strategy.ddp
    """`ddp`: each process has the whole model (LoRA, also on a 4-bit base). `fsdp`: each has a share of its weights (full
    fine-tuning, models that one GPU does not hold)."""


@dataclass
class PreflightSettings:
    """The check before a weight is loaded. Without effect on the training."""

    mode: PreflightMode = PreflightMode.run
    """`run`: check, then train. `only`: check, show everything and train nothing. `skip`: check no more than the data."""
    gpu: Gpu | None = None
    """With `preflight.mode=only`: check for this GPU in place of what this machine has."""
    strict: bool = False
    """Refuse data that would only be warned of: copies, pairs that contradict each other, held-out prompts that are trained
    on, columns that are not used."""


@dataclass
class ReportSettings:
    """`report.html`, the page of a run or of a sweep."""

    lang: Language = Language.en
    """`en`, or `zh` for a page in Chinese. What the program says elsewhere, warnings among it, is English."""
    against: str | None = None
    """Folder of an earlier run to compare a run with, row by row, where both held out the same rows."""


@dataclass
class Settings:
    """All settings of one run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    samples: SamplesSettings = field(default_factory=SamplesSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    """How the jobs of a sweep are run."""
    preflight: PreflightSettings = field(default_factory=PreflightSettings)
    """The check before a weight is loaded."""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """Several processes for one run."""
    report: ReportSettings = field(default_factory=ReportSettings)
    """The page of the run, and of a sweep."""
    seed: int = 3407
    """Seed of the shuffling, the adapter's start and dropout."""
    resume: str | None = None
    """Run folder to resume, in place and with its own settings. Stands alone on the command line, but for
    `model.trust_remote_code=true` where the run has that."""


GROUPS = ("model", "dataset", "lora", "trainer", "method", "export", "tracking", "distributed", "experiment", "sweep")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a settings class, whitespace folded: {field name: text}."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    docs, name = {}, None
    for node in body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = " ".join(str(node.value.value).split())
            name = None
    return docs


BUILT_IN = ("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny_random")
"""Names of the models that ship with the project."""

DATASETS = {name: ASSETS / f"{name}.jsonl" for name in ("twists", "twist_pairs", "sums")}
