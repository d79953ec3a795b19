"""Plain generation, one token after the other: what every faster engine has to agree with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from moiety.errors import UsageError
from moiety.infer.options import SamplingOptions
from moiety.infer.sampling import Draw, sample
from moiety.model.context import KVCache
from moiety.model.transformer import Transformer
from moiety.observe.record import Recorder, Span

__all__ = ["generate"]


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int = 128,
    sampling: SamplingOptions | None = None,
    end_id: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    recorder: Recorder | None = None,
) -> Iterator[int]:
    """Continue a prompt, yielding each token as it is drawn.

    Args:
        model: Any.
        prompt: Token ids, at least one.
        max_tokens: Most tokens to draw.
        sampling: What to draw from; the defaults of `SamplingOptions` when None.
        end_id: Stop after this token, which is yielded too.
        logit_bias: Added to the logits of these tokens.
        recorder: Takes the routing of every token.

    Raises:
        UsageError: an empty prompt, a token outside the vocabulary, or max_tokens below 1.
    """
    if not prompt:
        raise UsageError("the prompt has no token", hint="give at least one, such as the end-of-text token")
    vocabulary = model.config.vocab_size
    bias = dict(logit_bias or {})
    for what, tokens in (("the prompt", prompt), ("logit_bias", tuple(bias))):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise UsageError(
                f"{what} has tokens outside 0 to {vocabulary - 1}", hint="is this the model's tokenizer?"
            )
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; it must be positive")
    return _tokens(model, prompt, max_tokens, sampling or SamplingOptions(), end_id, bias, recorder)


@torch.inference_mode()
def _tokens(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingOptions,
    end_id: int | None,
    bias: Mapping[int, float],
    recorder: Recorder | None,
) -> Iterator[int]:
    weight = model.embed.weight
    answer: list[int] = []
    cache = KVCache(model.config, 1, len(prompt) + max_tokens, dtype=weight.dtype, device=weight.device)
    fresh = torch.tensor([list(prompt)], device=weight.device)
    request = 0 if recorder is None else recorder.next_request
    for _ in range(max_tokens):
        output = model(fresh, cache=cache)
        if recorder is not None:
            new = answer[-1:] or list(prompt)
            recorder.add(output.routing, [Span(request, len(prompt) + len(answer) - len(new), new)])
        draw = Draw(options=sampling, prompt=prompt, answer=answer, bias=bias)
        token = int(sample(output.last_logits, [draw]))
        yield token
        answer.append(token)
        if token == end_id:
            return
        fresh = torch.tensor([[token]], device=weight.device)
