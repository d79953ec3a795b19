"""Two network namespaces and the wire between them, which a thread of the test carries packet by packet.

Linux, as root. What `tc netem` would do is done here: each namespace has a TUN device, and whatever its kernel sends
comes out of a file in this process, which hands it to the other side: later, not at all, or never again.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path

TUN = Path("/dev/net/tun")
SET_INTERFACE, NO_ETHERNET, NO_HEADER = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
PACKET_BYTES = 1500


def refused() -> str:
    """Why namespaces cannot be had here; "" if they can."""
    if shutil.which("ip") is None or os.geteuid() != 0 or not os.access(TUN, os.R_OK | os.W_OK):
        return f"needs root, iproute2's ip and {TUN}"
    try:
        with Network():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no namespace with a TUN device: {error}"


class Network:
    """Side 0 and side 1, with the wire that joins them.

    Args:
        delay_s: From one side to the other.
        jitter_s: At most so much more, by chance, so that packets overtake each other.
        lost: The part of all packets that is lost.
        rate: Bytes a second that go through in each direction.

    `cut` may be changed at any time: the sides whose packets are lost, all of them, those on their way too.
    """

    def __init__(
        self, delay_s: float = 0.0, jitter_s: float = 0.0, lost: float = 0.0, rate: float = 1e9
    ) -> None:
        self.delay_s, self.jitter_s, self.lost, self.rate = delay_s, jitter_s, lost, rate
        self.cut: frozenset[int] = frozenset()
        self.carried, self.dropped = [0, 0], [0, 0]
        self.names = [f"m{os.getpid()}-{side}" for side in range(2)]  # of a namespace and of its device
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.files: list[int] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="wire")

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove)
            for side, name in enumerate(self.names):
                self._make(name, self.addresses[side], self.addresses[1 - side])
            self._thread.start()
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self._remove()

    def _make(self, name: str, own: str, other: str) -> None:
        ip("netns", "add", name)
        self.files.append(os.open(TUN, os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(
            self.files[-1], SET_INTERFACE, struct.pack("16sH22x", name.encode(), NO_ETHERNET | NO_HEADER)
        )
        ip("link", "set", name, "netns", name)  # the file stays here
        ip("netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
        ip("-n", name, "address", "add", own, "peer", other, "dev", name)
        for device in ("lo", name):
            ip("-n", name, "link", "set", device, "mtu", str(PACKET_BYTES), "up")

    def _remove(self) -> None:
        """Whoever is left in a namespace ends with it."""
        for name in self.names:
            listed = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for process in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        for file in self.files:
            os.close(file)

    def _carry(self) -> None:
        """Take what each side sends, and give it to the other when it is due."""
        chance, numbers, free_s = random.Random(0), itertools.count(), [0.0, 0.0]
        due: list[tuple[float, int, int, bytes]] = []
        while not self._closed.is_set():
            wait_s = min(max(due[0][0] - time.monotonic(), 0.0), 0.05) if due else 0.05
            ready, _, _ = select.select(self.files, (), (), wait_s)
            for file in ready:
                side, packet = self.files.index(file), os.read(file, PACKET_BYTES)
                free_s[side] = max(time.monotonic(), free_s[side]) + len(packet) / self.rate
                arrives_s = free_s[side] + self.delay_s + chance.random() * self.jitter_s
                if chance.random() < self.lost:
                    self.dropped[side] += 1
                else:
                    heapq.heappush(due, (arrives_s, next(numbers), side, packet))
            while due and due[0][0] <= time.monotonic():
                _, _, side, packet = heapq.heappop(due)
                if side in self.cut:
                    self.dropped[side] += 1
                else:
                    os.write(self.files[1 - side], packet)
                    self.carried[side] += 1


def ip(*words: str) -> None:
    """iproute2's command."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
