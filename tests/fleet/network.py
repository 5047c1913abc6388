"""Several hosts on one machine: network namespaces on a bridge, with what runs in each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

_TAG = f"wf{os.getpid() % 10_000}"
_NET = f"10.{77 + os.getpid() // 250 % 100}.{os.getpid() % 250}"


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@cache
def why_not() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "this needs root"
    if shutil.which("ip") is None:
        return "there is no ip (iproute2) here"
    try:
        ip("netns", "add", f"{_TAG}probe")
        ip("link", "add", f"{_TAG}p", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces or bridges here: {error.stderr.decode().strip()}"
    finally:
        ip("netns", "del", f"{_TAG}probe", check=False)
        ip("link", "del", f"{_TAG}p", check=False)
    return None


class Network:
    """A bridge, which the test can reach too, and a namespace for each host."""

    def __init__(self, names: Sequence[str]) -> None:
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        self._bridge = f"{_TAG}br"
        self.names = names
        self.address = {name: f"{_NET}.{n}" for n, name in enumerate(names, 1)}
        self._processes: list[subprocess.Popen[bytes]] = []

    def open(self) -> None:
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{_NET}.254/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        for name in self.names:
            space, outer, inner = self.space(name), f"{_TAG}{name}", f"{_TAG}{name}i"
            ip("netns", "add", space)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            ip("link", "set", outer, "master", self._bridge, "up")
            ip("link", "set", inner, "netns", space)
            ip("-n", space, "addr", "add", f"{self.address[name]}/24", "dev", inner)
            ip("-n", space, "link", "set", inner, "up")
            ip("-n", space, "link", "set", "lo", "up")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(30)
        for name in self.names:
            ip("netns", "del", self.space(name), check=False)
            ip("link", "del", f"{_TAG}{name}", check=False)
        ip("link", "del", self._bridge, check=False)

    def space(self, name: str) -> str:
        """The namespace of a host."""
        return f"{_TAG}-{name}"

    def run(self, name: str, command: Sequence[str], log: str) -> subprocess.Popen[bytes]:
        """Start something on a host; it ends with the network."""
        with open(log, "ab") as file:  # noqa: PTH123
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.space(name), *command], stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )
        self._processes.append(process)
        return process

    def cut(self, name: str) -> None:
        """Nothing comes from or to a host any more, without a word."""
        ip("link", "set", f"{_TAG}{name}", "down")

    def silence(self, name: str, to: str) -> None:
        """What one host sends to another does not arrive; the other way it does."""
        ip("-n", self.space(name), "route", "add", "blackhole", f"{self.address[to]}/32")

    def speak(self, name: str, to: str) -> None:
        """Take that back."""
        ip("-n", self.space(name), "route", "del", "blackhole", f"{self.address[to]}/32")

    def join(self, name: str) -> None:
        """Take that back."""
        ip("link", "set", f"{_TAG}{name}", "up")
