"""What `warmpool serve` serves where nobody says what: config/embedded.toml, a model to try warmpool with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from proxy.errors import HostError

log = logging.getLogger("warmpool")

_NAME: Final = "embedded.toml"
_PACKAGED: Final = Path(__file__).parent.parent / "config" / _NAME
"""In a wheel; in the sources it is in their folder config."""
_SOURCES: Final = Path(__file__).parent.parent.parent / "config" / _NAME


def path() -> Path:
    """The file. Raises HostError where it is not part of what is installed."""
    for candidate in (_PACKAGED, _SOURCES):
        if candidate.is_file():
            return candidate
    raise HostError(f"{_NAME} is not installed: name a configuration (warmpool serve --config FILE)")


def say_what_to_do() -> None:
    """Log what is served, and how to serve something else."""
    log.warning("no configuration was named: this serves demo, the load-test engine, which answers at random")
    if (there := Path("warmpool.toml")).exists():
        log.warning("there is a %s in this folder: warmpool serve --config %s", there, there)
    log.info("your own model: warmpool model add -c warmpool.toml -- vllm serve MODEL")
    log.info("then: warmpool serve --config warmpool.toml (all keys: warmpool config reference)")
