"""The status page in a real browser: what it shows, what its buttons do, and what it cannot be made to do."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio

from proxy.pool.wake_failure import WakeFailure
from proxy.server.admin.page import POLICY
from proxy.server.key_usage.figures import Figures
from proxy.tiers import Tier
from tests.front import Front, fronts_of_test
from tests.server.admin.test_control_api import NEVER
from tests.server.test_http import ASK, HELD
from tests.support import PATIENCE_S, ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from playwright.async_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}

# Playwright is bound to the loop that it was started on, and one chromium is enough.
on_one_loop = pytest.mark.asyncio(loop_scope="module")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH")


# --- without a browser ---


@on_one_loop
async def test_the_page_is_one_document_that_loads_nothing(front: Front) -> None:
    async with front.session.get("/admin/") as response:
        assert response.status == 200
        assert response.headers["Content-Security-Policy"] == POLICY
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        text = await response.text()
    assert "http://www.w3.org/2000/svg" in text
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    assert "unsafe" not in POLICY
    assert "innerHTML =" not in text
    async with front.session.get("/admin", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (308, "admin/")


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_can_be_read_in_both_themes() -> None:
    css = (ROOT / "proxy/server/admin/page/page.css").read_text()
    blocks = re.findall(r"\{[^{}]*--paper:[^{}]*\}", css)
    themes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(themes) == 3
    assert themes[1] == themes[2], "dark by the system is dark by choice"
    for theme in themes:
        texts = set(theme) - {"paper", "card", "line", "hover", "track", "accent-ink"}
        for name in texts:
            for ground in ("card", "paper"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground, theme[name])
        assert contrast(theme["accent"], theme["accent-ink"]) >= 4.5


# --- with one ---


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    """A headless chromium, one for all."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield running
        await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def browser(chromium: Browser) -> AsyncIterator[Browser]:
    """It, with no page of an earlier test."""
    yield chromium
    for context in chromium.contexts:
        await context.close()


@pytest_asyncio.fixture(loop_scope="module")
async def front_of(tmp_path: Path) -> AsyncIterator[Any]:
    """On this loop; the mark of a fixture's loop is on its function, which is not to be that of all the others."""
    async for make in fronts_of_test(tmp_path):
        yield make


class Visit:
    """A page that was opened, with everything that went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    async def until_state(self, state: str, instance: str = "demo-1") -> None:
        await self.page.locator(
            f'.instance[data-key="{instance}"] .state', has_text=re.compile(f"^{state}$")
        ).wait_for()

    async def press(self, name: str, *, confirm: bool = True) -> None:
        """Click a button of the first model, and confirm or not."""
        await self.page.locator(".model").first.get_by_role("button", name=name, exact=True).click()
        await (
            self.page.locator("#confirm").get_by_role("button", name=name if confirm else "Cancel", exact=True).click()
        )


async def visit(browser: Browser, front: Front, **options: Any) -> Visit:
    context = await browser.new_context(**{"viewport": DESKTOP, **options})
    opened = Visit(await context.new_page())
    await opened.page.goto(f"{front.url}/admin/")
    await opened.page.locator(".model").first.wait_for()
    return opened


@pytest_asyncio.fixture(loop_scope="module")
async def front(front_of: Any) -> Front:
    made: Front = await front_of(idle=NEVER)
    return made


@needs_chromium
@on_one_loop
async def test_it_follows_what_happens_and_its_buttons_give_commands(browser: Browser, front: Front) -> None:
    there = await visit(browser, front)
    page = there.page
    assert await page.locator("#connection").inner_text() == "serving"
    await front.post("/v1/completions", {**ASK, "stream": True})
    await there.until_state("ready")
    assert "load" in await page.locator(".wakes details[open] .waterfall").inner_text()
    await page.locator("#ttft td", has_text="stopped").wait_for()
    await there.press("Suspend", confirm=False)
    await there.until_state("ready")
    await there.press("Suspend")
    await there.until_state("suspended")
    (instance,) = front.pool.status()["models"]["demo"]["instances"]
    assert instance["state"] == "suspended"
    await there.press("Wake")
    await there.until_state("ready")
    await there.press("Drain")
    await page.locator(".model .pill", has_text="draining").wait_for()
    await there.press("Undrain")
    await page.locator(".model .pill", has_text="draining").wait_for(state="detached")
    await there.press("Stop")
    await page.locator('.instance[data-key="demo-1"]').wait_for(state="detached")
    assert there.errors == []


@needs_chromium
@on_one_loop
async def test_a_refusal_is_shown_and_the_box_waits_for_the_stream(browser: Browser, front: Front) -> None:
    await front.post("/v1/completions", ASK)
    there = await visit(browser, front)
    suspend = there.page.locator(".model").first.get_by_role("button", name="Suspend", exact=True)
    yes = there.page.locator("#confirm-yes")
    await suspend.click()
    async with front.session.post("/v1/completions", json=HELD) as stream:
        await there.page.locator(".instance", has_text="1 request").wait_for()
        await yes.click()  # nothing ran when it was asked for
        await there.page.locator("#toasts .bad", has_text="demo-1 is answering 1 requests").wait_for()
        await suspend.click()
        assert await yes.is_disabled()
        assert "1 request waits or runs" in await there.page.locator("#confirm-why").inner_text()
        await there.page.locator("#confirm-wait").check()
        assert await yes.inner_text() == "Suspend after the last request"
        await yes.click()
        await there.until_state("retiring")
        await front.release()
        assert (await stream.content.read()).endswith(b"data: [DONE]\n\n")
    await there.until_state("suspended")


@needs_chromium
@on_one_loop
async def test_a_dialog_asks_no_more_once_the_last_request_has_ended(browser: Browser, front: Front) -> None:
    await front.post("/v1/completions", ASK)
    there = await visit(browser, front)
    async with front.session.post("/v1/completions", json=HELD) as stream:
        await there.page.locator(".instance", has_text="1 request").wait_for()
        await there.page.locator(".model").first.get_by_role("button", name="Suspend", exact=True).click()
        await there.page.locator("#confirm-yes:disabled").wait_for()
        assert await there.page.evaluate("document.activeElement.id") == "confirm-wait"
        await front.release()
        await stream.content.read()
    await there.page.locator("#confirm-yes:enabled:focus").wait_for()
    assert not await there.page.locator("#confirm-why").is_visible()
    await there.page.keyboard.press("Enter")
    await there.until_state("suspended")


@needs_chromium
@on_one_loop
async def test_the_keyboard_is_enough(browser: Browser, front: Front) -> None:
    there = await visit(browser, front)
    keyboard = there.page.keyboard
    await keyboard.press("?")
    await there.page.locator("#keys[open]").wait_for()
    await keyboard.press("Escape")
    await keyboard.press("j")
    assert await there.page.evaluate("document.activeElement.dataset.key") == "demo"
    await keyboard.press("w")
    await keyboard.press("Enter")
    await there.until_state("ready")
    await keyboard.press("x")
    await keyboard.press("Enter")
    await there.page.locator("#confirm:not([open])").wait_for(state="attached")
    await there.until_state("ready")  # what cannot be undone is not the first choice
    await keyboard.press("s")
    await there.page.locator("#confirm-yes:enabled:focus").wait_for()  # once the command to wake is no request any more
    await keyboard.press("Enter")
    await there.until_state("suspended")
    await keyboard.press("t")
    assert await there.page.evaluate("document.documentElement.dataset.theme") == "light"


@needs_chromium
@on_one_loop
async def test_names_are_text_and_the_policy_lets_nothing_else_run(browser: Browser, front_of: Any) -> None:
    name = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    front: Front = await front_of(name=name, aliases=["</script>"], idle=NEVER)
    there = await visit(browser, front)
    assert await there.page.locator(".model .name").first.inner_text() == name
    assert await there.page.locator("main img, main script").count() == 0
    refused = await there.page.evaluate(
        """() => {
          const tries = [
            () => { document.body.innerHTML = "<b>x</b>"; },
            () => { const s = document.createElement("script"); s.text = "1"; document.body.append(s); },
          ];
          return tries.map((attempt) => { try { attempt(); return false; } catch { return true; } });
        }"""
    )
    assert refused == [True, True]
    assert await there.page.title() != "owned"


@needs_chromium
@on_one_loop
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_every_screen(browser: Browser, front_of: Any, viewport: dict[str, int], scheme: str) -> None:
    front: Front = await front_of(name="organisation/A-Model-With-A-Rather-Long-Name-70B-Instruct-AWQ", idle=NEVER)
    await front.post(
        "/v1/completions", {**ASK, "model": "organisation/A-Model-With-A-Rather-Long-Name-70B-Instruct-AWQ"}
    )
    there = await visit(browser, front, viewport=viewport, color_scheme=scheme)
    await there.until_state("ready")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await there.page.evaluate(wide) == 0
    ground = await there.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 245, 242)", "dark": "rgb(21, 20, 18)"}[scheme]
    for button in await there.page.locator(".model button").all():
        box = await button.bounding_box()
        assert box is not None
        assert box["height"] >= (40 if viewport is PHONE else 30)
        assert box["x"] + box["width"] <= viewport["width"]
    assert there.errors == []


@needs_chromium
@on_one_loop
async def test_it_asks_for_the_token_until_it_is_the_right_one(browser: Browser, front_of: Any, tmp_path: Path) -> None:
    token = "sesame-" * 6
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    front: Front = await front_of(idle=NEVER, server={"admin": {"token_file": str(tmp_path / "token")}})
    there = Visit(await (await browser.new_context()).new_page())
    await there.page.goto(f"{front.url}/admin/")
    for text in ("wrong", token):
        await there.page.locator("#token-dialog[open]").wait_for()
        await there.page.locator("#token").fill(text)
        await there.page.keyboard.press("Enter")
    await there.page.locator(".model").first.wait_for()
    await there.press("Wake")
    await there.until_state("ready")
    await there.page.reload()
    await there.until_state("ready")


@needs_chromium
@on_one_loop
async def test_it_says_when_the_server_is_gone(browser: Browser, front: Front) -> None:
    there = await visit(browser, front)
    front.pool.begin_stop()
    await there.page.locator("#connection", has_text="not connected").wait_for()


@needs_chromium
@on_one_loop
async def test_on_a_phone_it_shows_who_asks_the_logs_and_why_an_engine_did_not_start(
    browser: Browser, front_of: Any
) -> None:
    front: Front = await front_of(idle=NEVER)
    await front.post("/v1/completions", ASK)
    running = asyncio.create_task(front.post("/v1/completions", HELD))
    there = await visit(browser, front, viewport=PHONE)
    page = there.page
    await page.locator("#requests-open > summary").click()
    await page.locator("#requests td", has_text="200").wait_for()
    await page.locator("#requests-state").select_option("live")
    await page.locator("#requests td", has_text="200").wait_for(state="detached")
    await page.locator("#requests").get_by_role("button", name="Cancel").click()
    with pytest.raises(aiohttp.ClientError):
        await running
    await page.locator(".model").first.get_by_role("button", name="Logs").click()
    await page.locator("#logs-text", has_text="listening on").wait_for()
    await page.locator("#logs").get_by_role("button", name="Close").click()
    front.pool._state.models["demo"].last_failure = WakeFailure(
        "demo-1", Tier.STOPPED, 1.0, ("start: the engine ended",), ("CUDA out of memory",)
    )
    front.pool._state.tell()
    await page.locator(".failure summary", has_text="the engine ended").click()
    assert "CUDA out of memory" in await page.locator(".failure .log").inner_text()
    front.pool._state.models["demo"].draining = True
    front.pool._state.tell()
    await page.locator(".model .pill", has_text="draining").wait_for()
    assert await page.locator(".failure details[open]").count() == 1, "what was opened stays open"
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the phone"
    assert there.errors == []


@needs_chromium
@on_one_loop
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
async def test_it_shows_what_keys_and_models_have_used_today(
    browser: Browser, front: Front, viewport: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    await front.post("/v1/completions", {**ASK, "max_tokens": 7, "ignore_eos": True})
    used = Figures(12, 34_100, 998, 2048, 7300.0)
    front.service.usage._add({("team-with-a-long-name", "demo"): used})
    limits = {"tokens_per_day": 1000, "gpu_seconds_per_day": 36_000}
    monkeypatch.setattr(front.auth, "budgets", lambda: {"team-with-a-long-name": limits})
    there = await visit(browser, front, viewport=viewport)
    page = there.page
    await page.locator("#usage-open > summary").click()
    await page.locator("#usage tbody tr").nth(1).wait_for()
    first, second = await page.locator("#usage tbody tr").all()
    cells = await first.locator("td").all_inner_texts()
    assert cells == ["team-with-a-long-name", "demo", "12", "34100", "2048", "998", "2.0 h", "0"]
    cells = await second.locator("td").all_inner_texts()
    assert (cells[:3], cells[5]) == (["(no key)", "demo", "1"], "7")
    await page.locator(".budgets", has_text="35098 of 1000 tokens, 2.0 h of 10.0 h of GPU time").wait_for()
    await page.locator(".budgets .pill", has_text="used up, for ").wait_for()
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    if folder := os.environ.get("PICTURES"):
        await page.locator("#usage").scroll_into_view_if_needed()
        await page.screenshot(path=f"{folder}/usage-{viewport['width']}.png")
    assert there.errors == []
