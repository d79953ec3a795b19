"""A small model in a dozen numbers: what a person sets when training from scratch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.fields import check_types, option, positive, require

__all__ = ["ModelOptions"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The shape of a model to train. `experts=0` makes it dense."""

    d_model: int = option(128, help="width of the residual stream")
    layers: int = option(4, help="decoder blocks")
    heads: int = option(2, help="query heads")
    kv_heads: int = option(0, help="key/value heads; 0 means as many as query heads")
    d_ff: int = option(256, help="inner width of one expert, or of the dense feed-forward")
    experts: int = option(8, help="routed experts in each layer; 0 means a dense model")
    experts_per_token: int = option(2, help="experts that each token is sent to")
    router: str = option("softmax", help="a name that `moiety routers` lists, or module:Class for your own")
    router_options: tuple[str, ...] = option((), help="settings of that router, as name=value")
    renormalize: bool = option(True, help="divide the chosen weights by their sum")
    selection_bias: bool = option(False, help="balance by a bias on the choice (router sigmoid)")
    shared_d_ff: int = option(0, help="inner width of an expert every token uses; 0 means none")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = option(
        "silu", help="activation of the feed-forwards"
    )
    temperature: float = option(1.0, help="the router's logits are divided by this")
    router_gradient: Literal["own", "straight_through", "dense"] = option(
        "own", help="of the combine weights: the router's own, straight-through, or from all experts"
    )
    null_experts: int = option(0, help="further choices that cost nothing")
    capacity_factor: float = option(
        0.0, help="in training an expert takes at most this many times its fair share; 0 drops nothing"
    )
    eval_capacity_factor: float = option(0.0, help="the same outside training")
    overflow: str = option(
        "position",
        help="who gives way: position, priority, random, reroute, dense, or queue for a second pass",
    )
    balance_loss: float = option(0.01, help="coefficient of the load-balancing loss")
    z_loss: float = option(0.001, help="coefficient of the router z-loss")
    bias_rate: float = option(0.001, help="step of the selection bias")
    bias_rule: Literal["sign", "proportional", "quantile"] = option("sign", help="how that bias moves")
    tied: bool = option(True, help="use the token embedding as output head")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "d_model", "heads")
        require(self.experts >= 0, f"experts is {self.experts}; it must be 0 (dense) or positive")
        require(
            self.d_model % self.heads == 0,
            f"d_model is {self.d_model}, which {self.heads} heads do not divide evenly",
            "make d_model a multiple of heads",
        )

    def config(self, vocab_size: int, max_positions: int) -> ModelConfig:
        """The full description.

        Raises:
            ConfigError: the numbers do not fit together.
        """
        moe = self._moe() if self.experts else None
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=self.d_model,
            layers=self.layers,
            attention=AttentionConfig(
                heads=self.heads, kv_heads=self.kv_heads or self.heads, head_dim=self.d_model // self.heads
            ),
            d_ff=self.d_ff * (moe.experts_per_token if moe else 1),
            moe=moe,
            activation=self.activation,
            tied=self.tied,
            max_positions=max_positions,
        )

    def _moe(self) -> MoEConfig:
        """The MoE layers: every option of both carries over, and a router that fixes its own k gets it."""
        from moiety.moe.routers import ROUTERS, from_config

        names = {item.name for item in fields(MoEConfig)} & {item.name for item in fields(self)}
        values = {name: getattr(self, name) for name in names}
        kind = ROUTERS.get(self.router)
        if kind is not None and kind.fixed_k is not None:
            values["experts_per_token"] = kind.fixed_k
        moe = MoEConfig(**values)
        from_config(moe)  # refuse an unknown router, or a wrong option of it
        return moe
