"""Runs one checkpoint folder in vLLM, by the Python of an environment that has it: nothing of ours is imported.

Reads {"folder", "prompts", "wanted", "options"} from standard input and writes one line of JSON: for every prompt its
tokens, the greedy tokens after it, the log probability of every token of the vocabulary at every place but the first,
and the text. A prompt is tokens or a text. In place of all that may stand the error, as text.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB; the smallest there is
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # an engine's error is then raised here
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import torch
import vllm


def answer(
    folder: str, prompts: list[list[int] | str], wanted: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    tokens_only = not isinstance(prompts[0], str)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": tokens_only,
        "max_model_len": 256,
        "max_num_seqs": len(prompts),
        "max_logprobs": -1,  # as many as the vocabulary has
        "enforce_eager": True,  # compiling takes minutes
        "enable_prefix_caching": False,
        "seed": 0,
    }
    model = vllm.LLM(folder, **settings | options)
    greedy = vllm.SamplingParams(
        temperature=0,
        max_tokens=wanted,
        ignore_eos=True,
        logprobs=-1,
        prompt_logprobs=-1,
        detokenize=not tokens_only,
    )
    asked = [{"prompt_token_ids": prompt} if tokens_only else prompt for prompt in prompts]
    answers = []
    for done in model.generate(asked, greedy, use_tqdm=False):
        found = done.outputs[0]
        steps = [*done.prompt_logprobs[1:], *found.logprobs]
        answers.append(
            {
                "prompt": list(done.prompt_token_ids),
                "tokens": list(found.token_ids),
                "steps": [{token: one.logprob for token, one in step.items()} for step in steps],
                "text": found.text,
            }
        )
    return answers


def main() -> None:
    versions = f"vllm {vllm.__version__}, torch {torch.__version__}"
    try:
        found: Any = answer(**json.load(sys.stdin))
    except Exception as error:  # noqa: BLE001  what the engine does not do, the test names
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {error} at {where.line}"
    print("answer", json.dumps([versions, found]), flush=True)


if __name__ == "__main__":
    main()
