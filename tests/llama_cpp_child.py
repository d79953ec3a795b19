"""Runs GGUF files in llama.cpp, in a process of its own: its threads and its log stay there.

Reads [[file, prompt, tokens wanted, forced], ...] from standard input and writes one line of JSON for each: the greedy
tokens, and for each of them the log probability of every token. A prompt is tokens or a text; a forced token is taken
whatever its probability, because llama.cpp shows no token that is half a character. Without a number of tokens wanted
it writes why an answer ended whose every token was the forced one, and how many tokens the prompt had; that prompt may
be a list of messages.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def opened(file: str) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.use_jinja = True
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def answer(
    file: str, prompt: list[int] | str, wanted: int, forced: int | None
) -> tuple[list[int], list[dict[int, float]]]:
    request = {
        "prompt": prompt,
        "n_predict": wanted,
        "temperature": 0,
        "n_probs": 1000,
        "cache_prompt": False,
    }
    if forced is not None:
        request["logit_bias"] = {str(forced): 1000.0}
    found = opened(file).handle_completions(request)["choices"][0]["logprobs"]["content"]
    tokens = [int(one["id"]) for one in found]
    return tokens, [{int(top["id"]): top["logprob"] for top in one["top_logprobs"]} for one in found]


def ending(file: str, prompt: str | list[dict[str, str]], forced: int) -> tuple[str, int]:
    request = {"n_predict": 3, "temperature": 0, "cache_prompt": False, "logit_bias": {str(forced): 1000.0}}
    if isinstance(prompt, str):
        found = opened(file).handle_completions({**request, "prompt": prompt})
    else:
        found = opened(file).handle_chat_completions({**request, "messages": prompt})
    return found["choices"][0]["finish_reason"], found["usage"]["prompt_tokens"]


def main() -> None:
    for job in json.load(sys.stdin):
        print("answer", json.dumps(ending(*job) if len(job) == 3 else answer(*job)), flush=True)


if __name__ == "__main__":
    main()
