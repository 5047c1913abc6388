"""Try it, in a real browser: a conversation with a model, whoever may not have one, and what cannot be done."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from proxy.pool.instance import State
from proxy.pool.model import until_it_listens
from proxy.server.auth.administrator import NAME
from tests.front import Front
from tests.server.admin.test_control_api import NEVER
from tests.server.admin.test_page import (
    DESKTOP,
    PHONE,
    browser,
    chromium,
    front,
    front_of,
    needs_chromium,
    on_one_loop,
    visit,
)
from tests.server.admin.test_requests import listed
from tests.server.auth.test_authorization import Keyed, keyed_of_test
from tests.server.test_http import ASK
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from playwright.async_api import Browser, Page, Request, Route

__all__ = ["browser", "chromium", "front", "front_of"]

pytestmark = [needs_chromium, on_one_loop]
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest_asyncio.fixture(loop_scope="module")
async def keyed_of(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Keyed]]]:
    """On the loop of the browser."""
    async for make in keyed_of_test(tmp_path):
        yield make


async def say(page: Page, text: str) -> None:
    """Type a question and send it."""
    await page.locator("#chat-input").fill(text)
    await page.keyboard.press("Enter")


async def answered(page: Page, turns: int) -> str:
    """What is shown once so many turns have ended."""
    await page.locator(f".turn:not([aria-busy]):nth-child({turns})").wait_for()
    return await page.locator(".turn").nth(turns - 1).inner_text()


async def arm(front: Front, kind: str) -> None:
    """Have the engine misbehave at its next request."""
    async with front.session.post(f"{await front.engine()}/debug/fault", json={"kind": kind}) as response:
        assert response.status < 300


@pytest.mark.parametrize(("viewport", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"])
async def test_a_conversation_shows_the_wake_as_it_happens_and_then_the_times(
    browser: Browser, front_of: Any, monkeypatch: pytest.MonkeyPatch, viewport: dict[str, int], scheme: str
) -> None:
    go_on = asyncio.Event()

    async def held(*args: Any) -> None:
        await go_on.wait()
        await until_it_listens(*args)

    monkeypatch.setattr("proxy.pool.transitions.until_it_listens", held)
    front: Front = await front_of(name="organisation/A-Model-With-A-Rather-Long-Name-70B-Instruct-AWQ", idle=NEVER)
    there = await visit(browser, front, viewport=viewport, color_scheme=scheme)
    page, asked = there.page, list[list[dict[str, str]]]()

    def note(request: Request) -> None:
        if request.url.endswith("/chat/completions"):
            asked.append(orjson.loads(request.post_data or "")["messages"])

    page.on("request", note)
    await page.keyboard.press("a")
    await say(page, "Hello <b>there</b>")
    await page.locator(".turn-wake dt", has_text="load").wait_for()
    assert await page.locator(".turn-wake .moving").count() == 1, "of what goes on"
    assert await page.locator("#chat-send").is_disabled()
    assert await page.evaluate(WIDER) == 0
    go_on.set()
    first = await answered(page, 1)
    assert "Hello <b>there</b>" in first
    await page.locator(".turn-wake dt", has_text="warmup").wait_for()
    await page.locator(".facts", has_text="waited").first.wait_for()
    facts = await page.locator(".turn .facts").inner_text()
    for name in ("found stopped", "first token", "tokens", "tokens/s", "total"):
        assert name in facts
    (row,) = await listed(front, "?state=ended")
    assert (row["key"], row["path"]) == (NAME, "/v1/chat/completions")
    await say(page, "And then?")
    assert "found ready" in await answered(page, 2)
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][1]["content"] in first
    assert await page.evaluate(WIDER) == 0
    for button in await page.locator("#chat button").all():
        box = await button.bounding_box()
        assert box is not None
        assert box["height"] >= (40 if viewport is PHONE else 30)
    await page.locator("#chat-clear").click()
    assert await page.locator(".turn").count() == 0
    await say(page, "Anew")
    await answered(page, 1)
    assert [message["content"] for message in asked[2]] == ["Anew"]
    assert await page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == (
        '[{"warmpool-theme":""},{}]'
    ), "nothing of it is kept"
    assert there.errors == []


async def test_stop_ends_the_answer_and_its_request(browser: Browser, front_of: Any) -> None:
    front: Front = await front_of(idle=NEVER)
    await front.post("/v1/completions", ASK)
    there = await visit(browser, front)
    page = there.page
    await page.locator("#try").click()
    await arm(front, "hold_mid_stream")
    await say(page, "Hello")
    await page.locator(".turn > .said:not(.question)").wait_for()
    await page.locator("#chat-stop").click()
    assert "Stopped." in await answered(page, 1)
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["leases"]:
            await asyncio.sleep(0.01)
    await front.release()
    await arm(front, "hold_mid_stream")
    await say(page, "Hello again")
    await page.locator(".turn:nth-child(2) > .said:not(.question)").wait_for()
    await page.keyboard.press("Escape")
    assert "Stopped." in await answered(page, 2)
    await front.release()
    await arm(front, "die_mid_stream")
    await say(page, "And now?")
    assert "this is not the whole answer" in await answered(page, 3)
    await page.locator("#chat-close").click()
    await page.locator("#chat").wait_for(state="hidden")
    assert await page.evaluate("document.activeElement.id") == "try"


async def test_an_error_is_told_in_its_words_and_the_question_is_not_lost(browser: Browser, front_of: Any) -> None:
    front: Front = await front_of("--no-such-option", idle=NEVER)
    there = await visit(browser, front)
    await there.page.locator("#try").click()
    await say(there.page, "Hello")
    assert "could not be started" in await answered(there.page, 1)
    assert await there.page.locator("#chat-input").input_value() == "Hello"


async def test_what_a_model_says_is_text(browser: Browser, front: Front) -> None:
    there = await visit(browser, front)
    page, evil = there.page, "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

    async def answer(route: Route) -> None:
        chunks = [{"delta": {"reasoning_content": evil}}, {"delta": {"content": evil}, "finish_reason": "stop"}]
        events = [b"data: %b\n\n" % orjson.dumps({"choices": [chunk]}) for chunk in chunks]
        await route.fulfill(content_type="text/event-stream", body=b"".join([*events, b"data: [DONE]\n\n"]))

    await page.route("**/chat/completions", answer)
    await page.locator("#try").click()
    await say(page, evil)
    await answered(page, 1)
    assert await page.locator(".turn > .said:not(.question)").inner_text() == evil
    assert await page.locator(".thinking .said").text_content() == evil
    assert await page.locator(".turn img, .turn script").count() == 0
    assert await page.title() != "owned"
    assert there.errors == []


async def test_where_it_cannot_work_it_says_why(browser: Browser, front_of: Any, keyed_of: Any) -> None:
    front: Front = await front_of(idle=NEVER, routes={"chat": False})
    there = await visit(browser, front)
    talk = there.page.locator(".model .talk")
    await talk.click(force=True)  # as a finger does
    await there.page.locator("#toasts .bad", has_text="offers no chat").wait_for()
    assert await there.page.locator("#chat").is_hidden()
    await there.page.locator("#try").click()
    assert await there.page.locator("#chat-send").is_disabled()
    assert "No model here offers chat" in await there.page.locator("#chat-refusal").inner_text()
    keyed: Keyed = await keyed_of(None, admin={})
    there = await visit(browser, keyed.front)
    await there.page.locator("#try").click()
    assert await there.page.locator("#chat-send").is_disabled()
    assert "server.admin.token_file" in await there.page.locator("#chat-refusal").inner_text()


async def test_no_dialog_has_two_coloured_buttons_and_none_offers_what_cannot_work(
    browser: Browser, front_of: Any
) -> None:
    front: Front = await front_of(idle=NEVER)
    there = await visit(browser, front)
    page = there.page
    for dialog in await page.locator("dialog").all():
        assert await dialog.locator("button.go").count() <= 1
    for name, reason in (("Suspend", "There is no instance."), ("Stop", "There is no instance.")):
        button = page.locator(".model").first.get_by_role("button", name=name, exact=True)
        assert await button.get_attribute("aria-disabled") == "true"
        assert await button.get_attribute("title") == reason
        await button.click(force=True)
        await page.locator("#toasts .bad", has_text=reason).first.wait_for()
        assert await page.locator("dialog[open]").count() == 0
    await front.post("/v1/completions", ASK)
    await there.until_state("ready")
    await page.locator(".model").first.get_by_role("button", name="Stop", exact=True).click()
    yes = page.locator("#confirm-yes")
    assert (await yes.inner_text(), await yes.is_enabled()) == ("Stop", True)
    await page.locator("#confirm-force").check()
    assert await yes.inner_text() == "Stop at once"
    await page.locator("#confirm-no").click()
    await page.locator("#drain").click()
    assert await yes.inner_text() == "Drain the server"
    await yes.click()
    await page.locator("#connection", has_text="draining").wait_for()
    await page.locator("#try").click()
    assert "drained" in await page.locator("#chat-refusal").inner_text()
    assert there.errors == []


async def test_while_the_server_is_gone_it_says_so_and_nothing_can_be_asked(browser: Browser, front: Front) -> None:
    there = await visit(browser, front)
    page = there.page
    await page.locator("#try").click()
    await page.locator("#chat-send:enabled").wait_for()
    front.pool.begin_stop()
    await page.locator("#problem", has_text="The server is shutting down.").wait_for()
    await page.locator("#chat-refusal", has_text="The server cannot be reached.").wait_for()
    assert await page.locator("#chat-send").is_disabled()
    for link in await page.locator("nav a").all():
        target = await link.get_attribute("href")
        assert target is not None
        assert await page.locator(target).count() == 1


async def test_what_somebody_should_look_at_is_on_top(
    browser: Browser, front_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    front: Front = await front_of(idle=NEVER)
    await front.post("/v1/completions", ASK)
    there = await visit(browser, front)
    page = there.page
    assert await page.locator("#problems-section").is_hidden()
    held = {"id": "demo-9", "model": "demo", "reason": "<b>podman</b> hangs", "since_unix_s": 1.0}
    monkeypatch.setattr(front.pool._state.written_off, "status", lambda: [held])
    front.pool._state.tell()
    await page.locator("#problems li", has_text="<b>podman</b> hangs").wait_for()
    assert await page.locator("#problems b").all_inner_texts() == ["demo-9"]
    await arm(front, "die_mid_stream")
    with pytest.raises(aiohttp.ClientError):
        await front.post("/v1/completions", {**ASK, "stream": True})
    await page.locator("#requests-open > summary").click()
    await page.locator("#requests tr.bad .failed").wait_for()
    assert there.errors == []


async def test_with_200_models_and_500_requests_only_what_changes_is_shown_anew(
    browser: Browser, tmp_path: Path
) -> None:
    models = {f"model_{n}": engine_model(name=f"org/Model-{n}", idle=NEVER) for n in range(199)}
    front = Front(tmp_path, {"demo": engine_model(idle=NEVER), **models})
    await front.open()
    try:
        for n in range(500):
            await front.post("/v1/completions", {**ASK, "max_tokens": 1, "stream": bool(n % 2)})
        there = await visit(browser, front)
        page = there.page
        assert await page.locator(".model").count() == 200
        await page.evaluate(
            """() => {
              window.touched = new Set();
              new MutationObserver((changes) => {
                for (const { target } of changes) {
                  const card = (target.nodeType === 1 ? target : target.parentElement).closest(".model");
                  if (card) window.touched.add(card.dataset.key);
                }
              }).observe(byId("models"), { subtree: true, childList: true, attributes: true });
            }"""
        )
        model = front.pool._state.models["model_7"]
        front.pool._state.new_instance(model, "model_7-1").adopt(State.CHECKPOINTED, 0.0)
        front.pool._state.tell()
        await page.locator('.model[data-key="model_7"] .state', has_text="checkpointed").wait_for()
        touched = set(await page.evaluate("[...window.touched]"))
        assert touched - {"demo"} == {"model_7"}  # the demo says how long ago it was used
        await page.keyboard.press("/")
        await page.keyboard.type("model_19")
        assert await page.locator(".model:visible").count() == 10  # 19 and 190 to 198
        assert await page.locator("#find-count").inner_text() == "10 of 200"
        await page.locator("#find-name").fill("")
        await page.locator("#find-tier").select_option("checkpointed")
        assert await page.locator(".model:visible").count() == 1
        await page.locator("#requests-open > summary").click()
        await page.locator("#requests tbody tr").nth(99).wait_for()
        assert await page.locator("#requests tbody tr").count() == 100
        await page.locator("#requests-all").check()
        await page.locator("#requests tbody tr").nth(499).wait_for()
        await page.evaluate("window.firstRow = byId('requests').querySelector('tr:nth-child(9)')")
        await page.evaluate("showRequests()")
        assert await page.evaluate("window.firstRow.isConnected"), "rows stay, and with them focus and scrolling"
        unnamed = await page.evaluate(
            """() => [...document.querySelectorAll("button, input:not([hidden]), select, textarea")].filter(
              (c) => !(c.labels?.length || c.getAttribute("aria-label") || c.textContent.trim() || c.closest("dialog"))
            ).map((c) => c.outerHTML)"""
        )
        assert unnamed == []
        assert there.errors == []
    finally:
        await front.close()
