"""What is outdated is renewed, with engines in real containers: nobody waits for a cold start, nothing old is left."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from proxy.engine.kinds.vllm_inside import VllmInside
from tests.podman_bench import podman, why_no_podman
from tests.podman_host import AWAKE, Host
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.podman_bench import Tag
    from tests.served import Proxy

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


async def demo(proxy: Proxy) -> Any:
    return (await get_json(f"{proxy.url}/admin/status"))["models"]["demo"]


async def until_renewed(host: Host, proxy: Proxy, instance: str) -> None:
    """Return when the instance is the only one, and nothing is outdated any more."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status = await get_json(f"{proxy.url}/admin/status")
            entry = status["models"]["demo"]
            there = [i["id"] for i in entry["instances"]]
            if there == [instance] and entry["outdated"] is None and not status["leaving"]:
                break
            await asyncio.sleep(0.05)
        while len(host.containers()) > 1:
            await asyncio.sleep(0.05)


def made_from(host: Host) -> set[str]:
    """The container images that this host's containers were made from."""
    owned = f"label=io.warmpool.owner={host.owner}"
    return set(podman("ps", "--all", "--no-trunc", "--filter", owned, "--format", "{{.ImageID}}").split())


@contextlib.asynccontextmanager
async def busy(proxy: Proxy) -> AsyncIterator[set[str]]:
    """Clients that ask one after the other; the tiers that they found."""
    found: set[str] = set()

    async def ask() -> None:
        while True:
            found.add((await proxy.ask())[0])
            await asyncio.sleep(0.01)

    asking = asyncio.create_task(ask())
    yield found
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def test_a_tag_that_is_moved_costs_no_client_a_cold_start(host: Host, tag: Tag) -> None:
    keys = {"image": tag.name}
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys, max_instances=2)
    await proxy.ask()
    await proxy.until_all(2, "checkpointed")
    tag.point_to(1)
    async with busy(proxy) as found:
        proxy.process.send_signal(signal.SIGHUP)
        await until_renewed_to(host, proxy, tag.ids[1])
        await proxy.ask()
    assert "stopped" not in found
    log = proxy.log.read_text()
    assert f"demo is outdated: the container image {tag.name} is {tag.ids[1][:12]} now" in log
    assert "new requests go to demo-3" in log
    await proxy.until_all(2, "checkpointed")
    async with asyncio.timeout(PATIENCE_S):
        while made_from(host) != {tag.ids[1]}:
            await asyncio.sleep(0.05)
    assert (await proxy.ask())[0] == "checkpointed"
    assert [p.name for p in host.images.iterdir() if ".next" in p.name] == []


async def until_renewed_to(host: Host, proxy: Proxy, image_id: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await demo(proxy))["outdated"] is not None or "new requests go to" not in proxy.log.read_text():
            await asyncio.sleep(0.05)
        while image_id not in made_from(host):
            await asyncio.sleep(0.05)


async def test_an_engine_of_an_older_container_image_serves_after_a_restart_until_a_new_one_can(
    host: Host, tag: Tag
) -> None:
    keys = {"image": tag.name}
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys, idle=AWAKE)
    await proxy.ask()
    proxy.process.kill()
    proxy.process.wait()
    tag.point_to(1)
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys, idle=AWAKE)
    assert (await proxy.ask())[0] == "ready"
    await until_renewed(host, proxy, "demo-2")
    assert (await proxy.ask())[0] == "ready"
    assert made_from(host) == {tag.ids[1]}


async def test_a_renewal_that_is_cut_off_by_a_crash_leaves_the_old_checkpoint(host: Host, tag: Tag) -> None:
    keys = {"image": tag.name}
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys)
    _, text = await proxy.ask()
    await proxy.until("checkpointed")
    tag.point_to(1)
    proxy.process.send_signal(signal.SIGHUP)
    async with asyncio.timeout(PATIENCE_S):
        while not [p for p in host.images.iterdir() if p.name.startswith("demo.next")]:
            await asyncio.sleep(0.005)
    proxy.process.kill()
    proxy.process.wait()
    listed = host.command("ls", "--json", settings=host.settings("--load-seconds", "2", podman_keys=keys))
    assert f"outdated: the container image {tag.name} is" in listed.stdout
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys)
    assert await proxy.ask() != ("stopped", text)
    await until_renewed_to(host, proxy, tag.ids[1])
    assert (await proxy.ask())[1] == text


async def test_an_upgrade_that_changes_what_runs_inside_vllm_costs_no_client_a_cold_start(host: Host) -> None:
    proxy = await host.serve(engine="vllm")
    await proxy.ask()
    await proxy.until("checkpointed")
    proxy.process.send_signal(signal.SIGTERM)
    await proxy.session.close()
    await asyncio.to_thread(proxy.process.wait, PATIENCE_S)
    manifest = host.images / "demo" / "manifest.json"
    written = orjson.loads(manifest.read_bytes())
    assert written["extension"] == VllmInside().digest()
    manifest.write_bytes(orjson.dumps({**written, "extension": "0" * 64}))
    proxy = await host.serve(engine="vllm")
    async with busy(proxy) as found:
        async with asyncio.timeout(PATIENCE_S):
            while "new requests go to" not in proxy.log.read_text():
                await asyncio.sleep(0.05)
        await proxy.ask()
    assert "stopped" not in found
    assert "demo is outdated: it has in it what another version of warmpool runs inside vLLM" in proxy.log.read_text()
    await proxy.until("checkpointed")
    assert orjson.loads(manifest.read_bytes())["extension"] == VllmInside().digest()
    assert (await proxy.ask())[0] == "checkpointed"


async def test_a_template_that_is_edited_costs_no_client_a_cold_start_and_one_that_is_touched_nothing(
    host: Host, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("hello")
    keys = {"volumes": [{"source": str(template), "target": "/template.jinja"}]}
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys)
    await proxy.ask()
    await proxy.until("checkpointed")
    proxy.process.kill()
    proxy.process.wait()
    template.touch()
    proxy = await host.serve("--load-seconds", "2", podman_keys=keys)
    assert (await proxy.ask())[0] == "checkpointed"
    template.write_text("HELLO")
    async with busy(proxy) as found:
        proxy.process.send_signal(signal.SIGHUP)
        await until_renewed(host, proxy, "demo-2")
    assert "stopped" not in found
    log = proxy.log.read_text()
    assert log.count("demo is outdated: ") == 1
    assert f"demo is outdated: {template} was edited after the engine was started" in log
