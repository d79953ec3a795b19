"""How many processes a run has and what each is for, apart from the code so that `--help` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moiety.fields import check_types, not_negative, option, positive, require

__all__ = ["MeshOptions"]


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """The mesh: processes = data x expert x shard x tensor. Started by `torchrun`; one process is the default.

    Processes along the first three see different sequences of every batch, those along `tensor` the same ones.
    """

    data_parallel: int = option(
        0, help="copies of everything, each with its part of every batch; 0 is what the others leave"
    )
    expert_parallel: int = option(1, help="processes that share the experts of every layer among them")
    expert_nodes: int = option(
        1, help="nodes that these are on: a token is sent to a node once, and on from there"
    )
    shard_parallel: int = option(1, help="processes that keep a part of each weight and moment (FSDP2)")
    tensor_parallel: int = option(1, help="processes that share attention heads and dense layers")
    rank_timeout: float = option(600.0, help="seconds after which a silent process ends the run")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "expert_parallel", "expert_nodes", "shard_parallel", "tensor_parallel", "rank_timeout")
        not_negative(self, "data_parallel")
        require(
            self.expert_parallel % self.expert_nodes == 0,
            f"expert_parallel is {self.expert_parallel}, which {self.expert_nodes} expert_nodes do not divide",
            "give every node as many processes",
        )

    @property
    def model_ranks(self) -> int:
        """Processes that hold one copy of the model between them."""
        return self.expert_parallel * self.shard_parallel * self.tensor_parallel

    def copies(self, processes: int) -> int:
        """How many copies of the model that makes.

        Raises:
            ConfigError: the number of processes is another one.
        """
        copies = self.data_parallel or max(processes // self.model_ranks, 1)
        require(
            copies * self.model_ranks == processes,
            f"data {copies} x expert {self.expert_parallel} x shard {self.shard_parallel} x tensor "
            f"{self.tensor_parallel} are {copies * self.model_ranks} processes, and there are {processes}",
            f"start with torchrun --nproc-per-node {copies * self.model_ranks} -m moiety train ...",
        )
        return copies
