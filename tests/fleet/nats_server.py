"""A real nats-server for a test, where there is one."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = shutil.which("nats-server")
needs_nats = pytest.mark.skipif(
    PROGRAM is None or importlib.util.find_spec("nats") is None, reason="there is no nats-server, or no nats-py, here"
)


class NatsServer:
    """One server; `configuration` is the text of its file, without the port."""

    def __init__(self, folder: Path, configuration: str = "", port: int | None = None) -> None:
        self.port = port or _free_port()
        self._file = folder / f"nats-{self.port}.conf"
        self._file.write_text(f'listen: "127.0.0.1:{self.port}"\n{configuration}')
        self._log = folder / f"nats-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> NatsServer:
        assert PROGRAM is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([PROGRAM, "-c", str(self._file)], stdout=log, stderr=log)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert self._process.poll() is None, self._log.read_text()
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    await writer.wait_closed()
                    return self

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(PATIENCE_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
