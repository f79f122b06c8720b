"""Pretraining as the Hugging Face documentation shows it: load_dataset, map, group_texts, Trainer.

One rank, under torchrun; ``bench.py`` starts it to measure how long the first step takes to come.
Usage: trainer_recipe.py SETTINGS   (JSON: data, tokenizer, config, batch_size, max_seq_length, device, first)
"""

from __future__ import annotations

import json
import os
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def group_texts(examples: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Join the documents of a batch and cut them into blocks, as run_clm.py does."""
    joined = list(chain.from_iterable(examples["input_ids"]))
    blocks = [joined[start : start + length] for start in range(0, len(joined) // length * length, length)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def main() -> None:
    """Prepare the corpus, train one step and leave a file when it has ended."""
    setting = SimpleNamespace(**json.loads(sys.argv[1]))
    on_gpu, length = setting.device == "cuda", setting.max_seq_length
    args = TrainingArguments(
        output_dir=str(Path(setting.first).parent),
        max_steps=1,
        per_device_train_batch_size=setting.batch_size,
        bf16=on_gpu,
        torch_compile=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(setting.tokenizer)

    def tokenize(examples: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer([text + tokenizer.eos_token for text in examples["text"]])["input_ids"]}

    processes = len(os.sched_getaffinity(0))
    with args.main_process_first(desc="preparing the corpus"):
        texts = load_dataset("json", data_files=setting.data, split="train")
        tokens = texts.map(tokenize, batched=True, num_proc=processes, remove_columns=texts.column_names)
        blocks = tokens.map(group_texts, batched=True, num_proc=processes, fn_kwargs={"length": length})
    config = LlamaConfig.from_pretrained(setting.config, vocab_size=len(tokenizer), use_cache=False)
    trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=blocks)
    trainer.train()
    if trainer.is_world_process_zero():
        Path(setting.first).write_text("1")


if __name__ == "__main__":
    main()
