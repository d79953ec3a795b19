"""vLLM in a Python of its own, for bench/engine.py: PYTHON bench/_vllm_child.py FOLDER, which holds a config.json.

It imports nothing of ours, because vLLM has its own environment. Weights are vLLM's dummy ones, in bfloat16. The
questions and answers are those of `_engine_child.py`.
"""

from __future__ import annotations

import os
import random
import sys
import time

PROMPT = 16
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")


def main() -> None:
    """Load, say so, answer."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=sys.argv[1],
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=4096,
        max_num_seqs=128,
        max_num_batched_tokens=4096,
        enforce_eager=False,
        disable_log_stats=True,
    )
    vocabulary = engine.llm_engine.vllm_config.model_config.hf_config.vocab_size

    def seconds(length: int, drawn: int, batch: int) -> float:
        prompts = [
            {"prompt_token_ids": [random.randrange(100, vocabulary - 100) for _ in range(length)]}
            for _ in range(batch)
        ]
        asked = SamplingParams(temperature=0.0, max_tokens=drawn, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        engine.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - begun

    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "decode":
            batch, drawn = map(int, numbers)
            first = seconds(PROMPT, 1, batch)
            found = (seconds(PROMPT, drawn, batch) - first) / (drawn - 1)
        else:
            found = seconds(int(numbers[0]), 1, 1)
        print(f"seconds {found}", flush=True)


if __name__ == "__main__":
    main()
