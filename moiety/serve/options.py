"""Where a server listens and what it takes: options and limits, apart from the code so that reading them is cheap."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from moiety.fields import check_types, not_negative, option, positive, require

__all__ = [
    "KEY",
    "MOST_CHOICES",
    "MOST_DEPTH",
    "MOST_LOGPROBS",
    "MOST_MESSAGES",
    "MOST_N",
    "MOST_PROMPTS",
    "MOST_SCHEMA_BYTES",
    "MOST_TOOLS",
    "ServeOptions",
    "is_loopback",
]

KEY = "MOIETY_API_KEY"  # the variable of the environment that holds the key, here and in clients
MOST_N = 16
MOST_PROMPTS = 128
MOST_CHOICES = 128  # prompts times n
MOST_MESSAGES = 2048
MOST_TOOLS = 128
MOST_LOGPROBS = 20
MOST_SCHEMA_BYTES = 64 * 1024
MOST_DEPTH = 48


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where to listen, and the limits of a connection."""

    host: str = option("127.0.0.1", help="address to listen on; others than this machine's own need a key")
    port: int = option(8000, help="port to listen on; 0 takes a free one")
    replicas: int = option(
        1, help="engines behind the port, each in a process of its own with its share of threads"
    )
    name: str = option("", help="what clients call the model; empty is its folder's or its hub name")
    queue_tokens: int = option(
        0, help="most prompt tokens that wait for their first answer; 0 is 16 times max_positions"
    )
    body_bytes: int = option(4 * 2**20, help="largest body of a request")
    header_bytes: int = option(16 * 2**10, help="largest head of a request")
    connections: int = option(512, help="most connections at a time; more are told to come again")
    idle_s: int = option(20, help="seconds after which a connection that sends no whole request is closed")
    stall_s: int = option(60, help="seconds after which a client that does not read its answer is cut off")
    drain_s: int = option(8, help="seconds that answers may go on after SIGTERM")
    rank_timeout: int = option(
        600, help="under torchrun: seconds after which a silent process ends the others"
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.port <= 65535, f"port is {self.port}; allowed is 0 to 65535")
        require(1 <= self.replicas <= 64, f"replicas is {self.replicas}; allowed is 1 to 64")
        require(bool(self.host), "host is empty; 127.0.0.1 is this machine alone")
        not_negative(self, "queue_tokens")
        positive(self, "body_bytes", "header_bytes", "connections", "idle_s", "stall_s", "drain_s")
        positive(self, "rank_timeout")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
