"""What the Unsloth notebook does, as a plain script: the peer that `compare_notebook.py` measures against.

    python benchmarks/notebook_baseline.py --model DIR --data rows.json --load-in-4bit --out result.json

Unsloth and TRL are called as the notebook "Llama-3 8b" calls them, with its numbers. Nothing of this project is imported.
Writes {"losses": [...], "seconds": [...], "peak_allocated_gib": x, "peak_reserved_gib": x}, one entry a step.
"""

import argparse
import json
import time

PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
)


def main() -> None:
    """Load, attach, format, train 60 steps (or --steps) and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    from unsloth import FastLanguageModel  # isort: skip  (it patches what is imported next)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.model, max_seq_length=2048, dtype=None, load_in_4bit=args.load_in_4bit
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    with open(args.data, encoding="utf-8") as file:
        rows = json.load(file)
    texts = [PROMPT.format("", row["instruction"], row["output"]) + tokenizer.eos_token for row in rows]

    seconds, losses, began = [], [], [0.0]

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            began[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began[0])

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        callbacks=[Watch()],
        args=SFTConfig(
            dataset_text_field="text",
            max_length=2048,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            warmup_steps=5,
            max_steps=args.steps,
            learning_rate=2e-4,
            fp16=not torch.cuda.is_bf16_supported(),
            bf16=torch.cuda.is_bf16_supported(),
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir="/tmp/notebook_baseline",
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    result = {
        "losses": losses,
        "seconds": seconds,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
