"""What is done to warmpool inside the machine of tests/systemd_machine.py: ``python -m tests.systemd_inside TASK``.

Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import aiohttp

from tests.served import ASK
from tests.support import PATIENCE_S, get_json
from tests.systemd.test_restart import LATE, QUEUED, STREAMS, Clients

URL = "http://127.0.0.1:8080"


async def ask() -> dict[str, Any]:
    """One request."""
    timeout = aiohttp.ClientTimeout(PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.post(f"{URL}/v1/completions", json=ASK) as r:
        answer = await r.json()
        return {"status": r.status, "tier": r.headers.get("x-warmpool-tier"), "answer": answer}


async def until(state: str) -> dict[str, Any]:
    """Wait for the state of the first instance."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            instances = (await get_json(f"{URL}/admin/status"))["models"]["demo"]["instances"]
            if instances and instances[0]["state"] == state:
                return {"instance": instances[0]["id"]}
            await asyncio.sleep(0.05)


async def restart() -> dict[str, Any]:
    """`systemctl restart` in the middle of streams and queued requests, others arriving; how many came through."""
    clients = Clients(URL)
    text = await clients.ask()
    streams = [asyncio.create_task(clients.stream()) for _ in range(STREAMS)]
    while clients.begun < STREAMS:
        await asyncio.sleep(0.01)
    queued = [asyncio.create_task(clients.ask()) for _ in range(QUEUED)]
    async with asyncio.timeout(PATIENCE_S):
        while (await get_json(f"{URL}/admin/status"))["models"]["demo"]["queue"] < QUEUED:
            await asyncio.sleep(0.01)
    restarting = await asyncio.create_subprocess_exec("systemctl", "restart", "warmpool.service")
    await asyncio.sleep(0.5)
    late = [asyncio.create_task(clients.ask()) for _ in range(LATE)]
    ended = await asyncio.gather(*streams)
    texts = await asyncio.gather(*queued, *late)
    await clients.session.close()
    return {"streams": sum(ended), "answers": texts.count(text), "status": await restarting.wait()}


TASKS = {"ask": ask, "until": until, "restart": restart}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(TASKS[sys.argv[1]](*sys.argv[2:]))) + "\n")  # type: ignore[operator]
