"""A configuration of nats-server for a fleet: TLS, and a user for each host that can speak for itself only."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEAD = """\
# Written by `warmpool fleet nats`. A host is a user that may publish its own state, and no other's.
# Needs nats-server 2.14.0, 2.12.7 or 2.11.16 at least.
"""


def passwords(hosts: Sequence[str]) -> dict[str, str]:
    """A new one for each host."""
    return {host: secrets.token_urlsafe(32) for host in hosts}


def configuration(
    users: Mapping[str, str],
    *,
    listen: str,
    subject: str,
    certificate: str,
    key: str,
    ca: str,
    routes: Sequence[str] = (),
) -> str:
    """The text of nats.conf. `users`: host → password; `routes`: HOST:PORT of all servers, where they are several."""
    lines = [
        _HEAD + f'listen: "{listen}"',
        f'tls {{cert_file: "{certificate}", key_file: "{key}", timeout: 5}}',
        "max_payload: 1MB",
        "authorization {",
        "  users: [",
        *(_user(host, password, subject) for host, password in users.items()),
        "  ]",
        "}",
    ]
    if routes:
        port = routes[0].rpartition(":")[2]
        shown = ", ".join(f'"tls://{route}"' for route in routes)
        lines += [
            "cluster {",
            f'  name: "{subject}"',
            f'  listen: "{listen.rpartition(":")[0]}:{port}"',
            f'  tls {{cert_file: "{certificate}", key_file: "{key}", ca_file: "{ca}", timeout: 5}}',
            f"  routes: [{shown}]",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _user(host: str, password: str, subject: str) -> str:
    publish = f'["{subject}.state.{host}", "{subject}.use.{host}", "{subject}.again.*", "{subject}.hello"]'
    subscribe = f'["{subject}.state.*", "{subject}.use.*", "{subject}.again.{host}", "{subject}.hello"]'
    return (
        f'    {{user: "{host}", password: "{password}", permissions: {{\n'
        f"      publish: {publish}\n"
        f"      subscribe: {subscribe}}}}}"
    )
