"""Other libraries on the work that `speed.py` gives this project, as plain scripts: their own API, nothing of ours.

    python benchmarks/peer.py unsloth --model DIR --data rows.json --out result.json --rows 8 --passes 1
    python benchmarks/peer.py trl --model DIR --data rows.json --out result.json --rows 8 --passes 1 --load-in-4bit

LoRA r 16 on seven projections (`--targets` for others), the Alpaca prompt, loss on the whole text, rows in the order of the
same seed. Writes "seconds", "tokens" and "losses" of whole steps, from the end of one to the end of the next, "first_step" and
"saved", the seconds from the command to the end of the first step and to the saved adapter, and "peak_reserved_gib".
"""

import argparse
import itertools
import json
import resource
import time

import psutil

PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Load, attach, format, train and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["unsloth", "trl"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--targets", default=",".join(TARGETS), help="names of layers, separated by commas")
    args = parser.parse_args()
    started = psutil.Process().create_time()
    load = load_unsloth if args.library == "unsloth" else load_trl
    model, tokenizer = load(args)

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    with open(args.data, encoding="utf-8") as file:
        rows = json.load(file)
    texts = [PROMPT.format(row["instruction"], "", row["output"]) + tokenizer.eos_token for row in rows]
    gpu = torch.cuda.is_available()
    ends, losses, tokens, seen = [], [], [], [0]

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.time())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))
                tokens.append(seen[0])

    arguments = SFTConfig(
        dataset_text_field="text",
        max_length=args.max_length,
        per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=args.passes,
        gradient_checkpointing=args.checkpointing,
        warmup_steps=5,
        max_steps=args.steps,
        learning_rate=2e-4,
        bf16=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=1,
        optim=args.optim if gpu else "adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=args.out + ".run",
        save_strategy="no",
        report_to="none",
    )
    dataset = Dataset.from_dict({"text": texts})
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, callbacks=[Watch()], args=arguments)
    step = trainer.training_step

    def counted(model, inputs, *rest, **named):
        mask = inputs.get("attention_mask")
        seen[0] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return step(model, inputs, *rest, **named)

    trainer.training_step = counted
    trainer.train()
    model.save_pretrained(args.out + ".adapter")
    result = {
        "losses": losses,
        "first_step": ends[0] - started,
        "saved": time.time() - started,
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "tokens": [b - a for a, b in itertools.pairwise(tokens)],
        "peak_reserved_gib": peak_gib(),
    }
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(result, file)


def targets_of(args: argparse.Namespace) -> list[str]:
    """The layers that get an adapter."""
    return (getattr(args, "targets", None) or ",".join(TARGETS)).split(",")


def peak_gib() -> float:
    """Most memory so far: of the GPU as torch reserved it, or of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load_unsloth(args: argparse.Namespace):
    """Model and tokenizer as Unsloth's notebooks load them."""
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if args.checkpointing else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.model, max_seq_length=getattr(args, "max_length", 2048), dtype=None, load_in_4bit=args.load_in_4bit
    )
    model = FastLanguageModel.get_peft_model(
        model, r=getattr(args, "rank", 16), target_modules=targets_of(args), lora_alpha=16, lora_dropout=0, bias="none",
        random_state=3407, use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return model, tokenizer


def load_trl(args: argparse.Namespace):
    """Model and tokenizer as TRL's own script loads them."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    options = {"quantization_config": quantized} if args.load_in_4bit else {}
    place = {"dtype": torch.bfloat16, "device_map": {"": 0}} if torch.cuda.is_available() else {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(args.model, **place, **options)
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.checkpointing)
    config = LoraConfig(r=getattr(args, "rank", 16), lora_alpha=16, target_modules=targets_of(args), task_type="CAUSAL_LM")
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(args.model)


if __name__ == "__main__":
    main()
