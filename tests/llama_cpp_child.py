"""Runs GGUF files in llama.cpp, in a process of its own: its threads and its log stay there.

Reads [[file, prompt, tokens wanted, forced], ...] from standard input and writes one line of JSON for each: the greedy
tokens, and for each of them the log probability of every token. A prompt is tokens or a text; a forced token is taken
whatever its probability, because llama.cpp shows no token that is half a character.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def answer(
    file: str, prompt: list[int] | str, wanted: int, forced: int | None
) -> tuple[list[int], list[dict[int, float]]]:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    request = {
        "prompt": prompt,
        "n_predict": wanted,
        "temperature": 0,
        "n_probs": 1000,
        "cache_prompt": False,
    }
    if forced is not None:
        request["logit_bias"] = {str(forced): 1000.0}
    found = xllamacpp.Server(params).handle_completions(request)["choices"][0]["logprobs"]["content"]
    tokens = [int(one["id"]) for one in found]
    return tokens, [{int(top["id"]): top["logprob"] for top in one["top_logprobs"]} for one in found]


def main() -> None:
    for job in json.load(sys.stdin):
        print("answer", json.dumps(answer(*job)), flush=True)


if __name__ == "__main__":
    main()
