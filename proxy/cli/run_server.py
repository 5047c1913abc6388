"""The server, wired together and run to its end."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Final

import uvloop

from proxy.cli import embedded, wiring
from proxy.cli.failures import EXIT_HOST
from proxy.cli.options import environment_has_models
from proxy.config.load import load
from proxy.errors import HostError
from proxy.gpu.cuda import Gpus
from proxy.host import facts
from proxy.pool.pool import Pool
from proxy.pool.usage import Usage
from proxy.runtime.ladder_probes import FILE, LadderProbes
from proxy.runtime.state_dir import of_earlier_version
from proxy.server import server
from proxy.server.forced_exit import ForcedExit
from proxy.telemetry import logs
from proxy.telemetry.metrics import Metrics

_EXIT_S: Final = 5.0
"""How long the interpreter may take to end after the server has."""


def run(path: Path | None, log_format: str, log_level: str) -> None:
    """Serve until a signal: what is configured, or where nothing is, a model to try. Raises ConfigError, HostError."""
    unnamed = path is None and not environment_has_models()
    if unnamed:
        path = embedded.path()
    settings = load(path)
    logs.to_stderr(log_format, log_level)
    if unnamed:
        embedded.say_what_to_do()
    elif path is not None:
        logging.getLogger("warmpool").info("configuration: %s", path)
    if earlier := of_earlier_version(settings.pool.state_dir.absolute(), Path.cwd()):
        logging.getLogger("warmpool").warning(earlier)
    metrics = Metrics()
    gpus = Gpus()
    usage = Usage(settings.pool.state_dir / "usage.json")
    usage.load()
    probes = LadderProbes(settings.pool.state_dir / FILE)
    probes.load()
    runtimes = wiring.runtimes(settings, gpus)

    def memory() -> facts.Memory:
        """Where engines run: in each of the runtimes that there are models of."""
        return facts.least(runtimes[name].memory() for name in {m.runtime for m in pool.settings.models.values()})

    pool = Pool(settings, runtimes, metrics, gpus=gpus, usage=usage, probes=probes, memory=memory)
    # What is here stays, and requests leave hardly a cycle: looking for them as often as Python does by default takes a
    # tenth of a request's time.
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)
    forced_exit = ForcedExit()

    async def run() -> None:
        try:
            await server.serve(
                pool, settings, metrics, load=lambda: load(path), file=path, usage=usage, forced_exit=forced_exit
            )
        except HostError as error:
            forced_exit.within(_EXIT_S, EXIT_HOST, f"warmpool: {error}")
            raise
        finally:
            # Event loop and interpreter wait for tasks and threads, which may hang.
            forced_exit.within(_EXIT_S)

    try:
        uvloop.run(run())
    finally:
        gpus.close()
