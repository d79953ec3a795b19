"""One engine in a process of its own, for bench/engine.py: python bench/_engine_child.py ENGINE MODEL LAYERS [FILE].

After "ready" it reads lines "decode BATCH TOKENS" and "prefill TOKENS" and answers each with seconds: of one token of
all sequences after prompts of 16 tokens, or of a whole prompt.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from moiety.train.host import keep_freed_memory

PROMPT = 16
Call = Callable[
    [int, int, int], float
]  # prompt tokens, tokens drawn, batch: seconds of a token after the first, or of it


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Different ones each time, so that nothing is found in a cache of prompts."""
    return [[random.randrange(100, vocabulary - 100) for _ in range(length)] for _ in range(count)]


def ours(model: str, layers: int, _: str) -> Call:
    """`moiety.Engine` on packed weights."""
    from _models import packed_model, shape_named

    import moiety
    from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions

    config = shape_named(model, layers)
    options = EngineOptions(max_positions=4096, max_requests=128, kv_bytes=2 << 30, prefix_cache=False)
    engine = moiety.Engine(packed_model(config, "int4-g32"), options=options)

    def run(length: int, drawn: int, batch: int) -> float:
        asked = RequestOptions(max_tokens=drawn, sampling=SamplingOptions(temperature=0))
        begun = time.perf_counter()
        handles = [engine.submit(prompt, asked) for prompt in prompts(batch, length, config.vocab_size)]
        while not all(handle.is_done for handle in handles):
            engine.step()
        if drawn == 1:
            return time.perf_counter() - begun
        times = sorted(at for handle in handles for at in handle.request.times_s)
        return (times[-1] - times[batch - 1]) / (drawn - 1)

    return run


def llama_cpp(model: str, layers: int, file: str) -> Call:
    """llama.cpp's server, Q4_0, as its wheel has it; its own timings for one sequence, the clock for several."""
    import xllamacpp
    from _models import shape_named

    vocabulary = shape_named(model, layers).vocab_size
    servers: dict[int, Any] = {}

    def server(batch: int) -> Any:
        if batch not in servers:
            servers.clear()
            params = xllamacpp.CommonParams()
            params.model.path, params.n_parallel = file, batch
            params.n_ctx = max(4096, 256 * batch)
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
            params.verbosity = 0
            servers[batch] = xllamacpp.Server(params)
        return servers[batch]

    def run(length: int, drawn: int, batch: int) -> float:
        answering, found = server(batch), []

        def ask(prompt: list[int]) -> None:
            request = {
                "prompt": prompt,
                "n_predict": drawn,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
            found.append(answering.handle_completions(request)["timings"])

        threads = [
            threading.Thread(target=ask, args=(prompt,)) for prompt in prompts(batch, length, vocabulary)
        ]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        if drawn == 1:
            return found[0]["prompt_ms"] / 1e3
        return (
            max(timing["predicted_ms"] for timing in found) / 1e3 / drawn if batch == 1 else seconds / drawn
        )

    return run


def fill(weight: torch.Tensor) -> None:
    """Random numbers, a few again and again: making new ones takes longer than measuring."""
    if weight.dim() == 1:
        weight.fill_(1.0)
        return
    few = torch.empty((1 << 20) + 1, dtype=weight.dtype).uniform_(-0.05, 0.05)
    for piece in weight.view(-1).split(len(few)):
        piece.copy_(few[: len(piece)])


def transformers(model: str, layers: int, _: str) -> Call:
    """transformers in bfloat16 with its fastest experts on this machine."""
    from _models import shape_named
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    from moiety.model.families import family_for

    config = shape_named(model, layers)
    family = family_for(config).family
    values = family.write(config)
    theirs = AutoConfig.for_model(values.pop("model_type"), **values)
    theirs.dtype = torch.bfloat16
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16)
    net = net.to_empty(device="cpu").eval()
    for parameter in net.parameters():
        fill(parameter.data)
    net.model.rotary_emb = type(net.model.rotary_emb)(theirs)
    net.set_experts_implementation("grouped_mm")

    @torch.inference_mode()
    def run(length: int, drawn: int, batch: int) -> float:
        cache = DynamicCache(config=theirs)
        tokens = torch.tensor(prompts(batch, length, config.vocab_size))
        begun = time.perf_counter()
        token = net(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        if drawn == 1:
            return time.perf_counter() - begun
        begun = time.perf_counter()
        for _ in range(drawn - 1):
            token = net(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        return (time.perf_counter() - begun) / (drawn - 1)

    return run


def main() -> None:
    """Load, say so, answer."""
    keep_freed_memory()
    name, model, layers, file = sys.argv[1:]
    run = {"ours": ours, "llama.cpp": llama_cpp, "transformers": transformers}[name](model, int(layers), file)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "decode":
            batch, drawn = map(int, numbers)
            seconds = run(PROMPT, drawn, batch)
        else:
            seconds = run(int(numbers[0]), 1, 1)
        print(f"seconds {seconds}", flush=True)


if __name__ == "__main__":
    main()
