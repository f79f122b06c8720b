"""What vLLM or llama.cpp makes of a checkpoint; runs in an environment that holds that program and nothing of ours.

``peer_worker.py vllm|llama MODEL QUESTION ANSWER``: the question is a JSON file with ``texts`` to tokenise, ``prompts``
to continue and how many tokens to add at most (``length``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def ask_vllm(model: str, texts: list[str], prompts: list[str], length: int) -> dict[str, Any]:
    """As ``vllm serve`` opens a checkpoint, but with logits where it gives logarithms of probabilities."""
    from vllm import LLM, SamplingParams

    small = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}  # nothing compiled for a minute's use
    llm = LLM(model, dtype="float32", max_logprobs=-1, logprobs_mode="raw_logits", **small)
    greedy = SamplingParams(temperature=0, max_tokens=length, logprobs=-1, prompt_logprobs=-1, detokenize=False)
    answers = []
    for result in llm.generate(prompts, greedy):
        (continuation,) = result.outputs
        rows = [*result.prompt_logprobs[1:], *continuation.logprobs]  # nothing predicts the first token
        logits = [[row[token].logprob for token in range(len(row))] for row in rows]
        answers.append(
            {"prompt": result.prompt_token_ids, "continuation": list(continuation.token_ids), "logits": logits}
        )
    return {"ids": [llm.get_tokenizer().encode(text) for text in texts], "answers": answers}


def ask_llama(model: str, texts: list[str], prompts: list[str], length: int) -> dict[str, Any]:
    """As llama.cpp runs a GGUF file, without the start token that transformers doesn't put before a prompt either."""
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=0, logits_all=True, verbose=False)
    answers = []
    for text in prompts:
        prompt, continuation = llama.tokenize(text.encode(), add_bos=False), []
        llama.reset()
        llama.eval(prompt)
        while len(continuation) < length and llama.token_eos() not in continuation:
            continuation.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(continuation[-1:])
        logits = llama.scores[: llama.n_tokens - 1].tolist()
        answers.append({"prompt": prompt, "continuation": continuation, "logits": logits})
    return {"ids": [llama.tokenize(text.encode(), add_bos=False) for text in texts], "answers": answers}


if __name__ == "__main__":  # vLLM starts this file a second time
    peer, model_path, question_path, answer_path = sys.argv[1:]
    question = json.loads(Path(question_path).read_text(encoding="utf-8"))
    found = {"vllm": ask_vllm, "llama": ask_llama}[peer](model_path, **question)
    Path(answer_path).write_text(json.dumps(found), encoding="utf-8")
