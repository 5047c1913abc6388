"""Checks of what gives an engine its network and holds its traffic back."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from proxy.doctor.report import Check
from proxy.runtime.podman import bridges

if TYPE_CHECKING:
    from proxy.doctor.needs import Situation
    from proxy.doctor.view import Host

_CONFIGURATION: Final = (Path("/usr/share/containers/containers.conf"), Path("/etc/containers/containers.conf"))
_DROP_INS: Final = Path("/etc/containers/containers.conf.d")
_NETAVARK: Final = tuple(f"/usr/{d}/podman/netavark" for d in ("lib", "libexec", "local/lib", "local/libexec"))
_PROGRAMS: Final = {"iptables": ("iptables", "-t", "nat", "-S"), "nftables": ("nft", "list", "tables")}
"""What shows whether a firewall driver can work; both only read."""
_PACKAGES: Final = {"iptables": "iptables", "nft": "nftables"}


async def tables(it: Situation) -> list[Check]:
    """iptables or nft: whichever sets networks up here, and whichever CRIU is told to lock them with."""
    name = "iptables, nft"
    if not it.needs.uses_podman:
        return [Check(name, "skip", "no model runs in podman")]
    engines = it.needs.podman.values()
    uses: dict[str, str] = {}
    if it.needs.checkpoints and any(engine.criu.network_lock == "iptables" for engine in engines):
        uses["iptables"] = 'a model has network_lock = "iptables"'
    if not engines or any(engine.network != "host" for engine in engines):
        driver, who = await _driver(it)
        uses[driver] = f"{who} sets networks up with {driver}"
    if not uses:
        return [Check(name, "skip", "all models use the host's network")]
    answers = [(why, *await _works(it.host, driver)) for driver, why in uses.items()]
    broken = [(f"{why}: {reason}", fix) for why, reason, fix in answers if reason]
    if broken:
        return [Check(name, "fail", "; ".join(b[0] for b in broken), "\n".join(b[1] for b in broken))]
    return [Check(name, "ok", "; ".join(uses.values()) + ", which works")]


async def _works(host: Host, driver: str) -> tuple[str, str]:
    """What keeps a firewall driver from working and its fix; empty texts when it works."""
    command = _PROGRAMS.get(driver)
    if command is None:
        return "", ""
    if host.which(command[0]) is None:
        return f"no {command[0]} in PATH", f"apt-get install {_PACKAGES[command[0]]}"
    ran = await host.run(*command)
    return ("", "") if ran.status == 0 else (ran.reason(), f"{' '.join(command)}   # says more")


async def _driver(it: Situation) -> tuple[str, str]:
    """The firewall driver, and the program that uses it.

    containers.conf names one, or netavark has its own: iptables before 1.11, since then it tells.
    """
    if it.podman.network_backend == "cni":
        return "iptables", "CNI"
    program = it.podman.netavark or next((path for path in _NETAVARK if it.host.exists(path)), "")
    version, own = await _netavark(it.host, program) if program else ("", "")
    who = f"netavark {version}".strip()
    return _configured(it.host) or own or "iptables", who


async def _netavark(host: Host, program: str) -> tuple[str, str]:
    ran = await host.run(program, "version")
    try:
        answer = orjson.loads(ran.output)
        return str(answer["version"]), str(answer.get("default_fw_driver", ""))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "", ""


def _configured(host: Host) -> str:
    """`firewall_driver` of containers.conf and its drop-ins; empty where it is left to netavark."""
    driver = ""
    for path in (*_CONFIGURATION, *(p for p in host.files(_DROP_INS) if p.suffix == ".conf")):
        named = re.findall(r"^\s*firewall_driver\s*=\s*[\"'](\w*)[\"']", host.text(path) or "", re.MULTILINE)
        driver = named[-1] if named else driver
    return driver


async def networks(it: Situation) -> list[Check]:
    """The networks that models name."""
    named = sorted({e.network for e in it.needs.podman.values()} - {"bridge", "host", "podman"})
    if not named or it.podman.reason or it.host.which("podman") is None:
        return []
    answers = await asyncio.gather(*(it.host.run("podman", "network", "exists", network) for network in named))
    missing = [network for network, ran in zip(named, answers, strict=True) if ran.status != 0]
    if missing:
        fix = "\n".join(f"podman network create {network}" for network in missing)
        return [Check("networks", "fail", f"missing: {', '.join(missing)}", fix)]
    return [Check("networks", "ok", ", ".join(named))]


async def bridge_addresses(it: Situation) -> list[Check]:
    """Whether bridges that are there keep their MAC address, see proxy/runtime/podman/bridges.py."""
    used = sorted({"podman" if e.network == "bridge" else e.network for e in it.needs.podman.values()} - {"host"})
    if not used or it.podman.reason or it.host.which("podman") is None:
        return []
    ran = await it.host.run("podman", "network", "inspect", *used)
    try:
        devices = [n.get("network_interface", "") for n in orjson.loads(ran.output) if n.get("driver") == "bridge"]
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        return []
    moving = [d for d in devices if d and bridges.follows_its_ports(d, it.host.path("/sys/class/net"))]
    if moving:
        found = (
            f"{', '.join(moving)}: the address changes as containers come and go, and engines are out of reach for "
            "seconds; warmpool holds it when it starts or restores one there"
        )
        fix = "\n".join(f"ip link set dev {d} address $(cat /sys/class/net/{d}/address)" for d in moving)
        return [Check("bridge address", "warn", found, fix)]
    return [Check("bridge address", "ok", "kept, or held by warmpool when the first container comes")]
