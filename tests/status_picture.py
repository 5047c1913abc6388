"""The pictures of the status page that README and docs show: ``python -m tests.status_picture [FOLDER]``.

Root, with CRIU and chromium: three models on three tiers, one of them just woken from its checkpoint, by a question
that was asked in the page; the same on a phone, where it is dark.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.async_api import async_playwright

from tests.served import Proxy
from tests.server.admin.test_page import CHROMIUM
from tests.support import PATIENCE_S, ROOT, engine_model, get_json

if TYPE_CHECKING:
    from playwright.async_api import ViewportSize

FOLDER = ROOT / "docs" / "pictures"
DESK: ViewportSize = {"width": 1200, "height": 1040}
PHONE: ViewportSize = {"width": 390, "height": 844}
QUESTION = "Name a few things that one sees on a long walk."
PACE = ("--ttft", "0.03", "--tokens-per-second", "40")
LONG = {"sleeping": "10m", "suspended": "20m", "checkpointed": "30m"}


def model(name: str, load_s: float, **idle: str) -> dict[str, Any]:
    return engine_model("--load-seconds", str(load_s), "--memory", "64MiB", *PACE, name=name, idle={**LONG, **idle})


MODELS = {
    "demo": model("org/Demo-7B-Instruct", 2),
    "small": model("org/Small-1B-Instruct", 1, sleeping="200ms", suspended="400ms"),
    "coder": model("org/Coder-7B-Instruct", 3, sleeping="200ms"),
}
WANTED = {"demo": "ready", "small": "suspended", "coder": "sleeping"}


async def ask(proxy: Proxy, name: str) -> None:
    body = {"model": name, "prompt": "Hello", "max_tokens": 16, "temperature": 0}
    async with proxy.session.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()


async def until(proxy: Proxy) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            models = (await get_json(f"{proxy.url}/admin/status"))["models"]
            if all(models[key]["instances"][0]["state"] == state for key, state in WANTED.items()):
                return
            await asyncio.sleep(0.1)


async def take(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        proxy = await Proxy(Path(shared) / "warmpool", settings={"models": MODELS}).listening()
        try:
            for name in MODELS:
                await ask(proxy, f"org/{name.capitalize()}-{'1B' if name == 'small' else '7B'}-Instruct")
            async with proxy.session.post("/admin/models/demo/checkpoint", json={}) as answer:
                assert answer.status == 200, await answer.text()
            async with async_playwright() as playwright:
                browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                page = await browser.new_page(viewport=DESK)
                await page.goto(f"{proxy.url}/admin/")
                await page.locator('.instance[data-key="coder-1"]').wait_for()
                await page.locator("#try").click()
                await page.locator("#chat-input").fill(QUESTION)
                await page.keyboard.press("Enter")
                await page.locator(".turn:not([aria-busy]) .facts", has_text="waited").wait_for()
                await page.locator(".turn-wake dt", has_text="canary").wait_for()
                await until(proxy)
                await page.mouse.move(0, 0)
                await page.locator("#chat").screenshot(path=folder / "try-it.png")
                await page.locator("#chat-close").click()
                await page.evaluate("document.activeElement.blur()")
                await page.locator('.instance[data-key="small-1"] .state', has_text="suspended").wait_for()
                await page.screenshot(path=folder / "status-page.png")
                page = await browser.new_page(viewport=PHONE, color_scheme="dark")
                await page.goto(f"{proxy.url}/admin/")
                await page.locator('.instance[data-key="coder-1"]').wait_for()
                await page.screenshot(path=folder / "status-phone.png")
                await browser.close()
        finally:
            await proxy.session.close()
            proxy.process.terminate()
            await proxy.ended()


if __name__ == "__main__":
    asyncio.run(take(Path(sys.argv[1]) if sys.argv[1:] else FOLDER))
