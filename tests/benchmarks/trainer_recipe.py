"""Pretraining as the Hugging Face documentation shows it: load_dataset, map, group_texts, Trainer.

One rank, under torchrun; ``bench.py`` starts it to measure how long the first step takes to come.
"""

from __future__ import annotations

import argparse
import os
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


class FirstStep(TrainerCallback):
    """Leaves a file when the first step has ended."""

    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text(str(state.global_step))


def group_texts(examples: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Join the documents of a batch and cut them into blocks, as run_clm.py does."""
    joined = list(chain.from_iterable(examples["input_ids"]))
    whole = len(joined) // length * length
    blocks = [joined[start : start + length] for start in range(0, whole, length)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--shape", type=int, nargs=4, metavar=("LAYERS", "HIDDEN", "MLP", "HEAD"), required=True)
    parser.add_argument("--first-step", type=Path, required=True)
    parser.add_argument("output")
    return parser.parse_args()


def main() -> None:
    """Prepare the corpus and train one step."""
    options = parse_arguments()
    on_gpu = options.device == "cuda"
    args = TrainingArguments(
        output_dir=options.output,
        max_steps=1,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        bf16=on_gpu,
        torch_compile=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)

    def tokenize(examples: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer([text + tokenizer.eos_token for text in examples["text"]])["input_ids"]}

    processes = len(os.sched_getaffinity(0))
    with args.main_process_first(desc="preparing the corpus"):
        texts = load_dataset("json", data_files=options.data, split="train")
        tokens = texts.map(tokenize, batched=True, num_proc=processes, remove_columns=texts.column_names)
        blocks = tokens.map(group_texts, batched=True, num_proc=processes, fn_kwargs={"length": options.length})
    layers, hidden, mlp, head = options.shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=blocks,
        data_collator=default_data_collator,
        callbacks=[FirstStep(options.first_step)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
