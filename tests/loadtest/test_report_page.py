"""The load tests' report in a real browser, at a phone's and a desk's width, in both themes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from loadtest import results
from loadtest.report import page
from tests.loadtest.test_results import TIERS, run_file
from tests.server.admin.test_page import CHROMIUM, DESKTOP, PHONE, contrast, needs_chromium

if TYPE_CHECKING:
    from pathlib import Path

CUT_OFF = """
() => [...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width).flatMap(svg =>
  [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBBox(), view = svg.viewBox.baseVal;
    return box.x < -1 || box.x + box.width > view.width + 1 || box.y + box.height > view.height + 1;
  }).map(text => `${svg.getAttribute('aria-label')}: ${text.textContent}`))
"""
COLOURS = """
() => ['--ink', '--soft', '--card', '--paper'].map(name => getComputedStyle(document.documentElement)
  .getPropertyValue(name).trim())
"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    files = [run_file(tmp_path / name, name, TIERS) for name in ("restore", "trace")]
    flags = {"default": [0.3] * 10, "a setting with a long name = false": [0.4] * 10}
    files.append(run_file(tmp_path / "flags", "restore-flags", flags))
    with results.Writer(tmp_path / "checkpoint", "checkpoint", {}) as writer:
        writer.note("a word of a log that is as long as this: request_id=" + "c25df7942f22bd88" * 8)
        writer.sample("awake", {"image_bytes": 2 << 30, "memory_pages_bytes": 2 << 30, "making.checkpoint.dump_s": 3.0})
        writer.close()
    files += [tmp_path / "checkpoint"] * 2
    files.append(run_file(tmp_path / "one", "baseline", {"stopped": [25.9]}))
    path = tmp_path / "report.html"
    path.write_text(page.render([results.read(file) for file in files]))
    return path


@needs_chromium
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_and_can_be_read(report: Path, viewport: Any, scheme: Any) -> None:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        context = await browser.new_context(viewport=viewport, color_scheme=scheme)
        opened = await context.new_page()
        problems: list[str] = []
        asked: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda message: problems.append(message.text))
        opened.on("request", lambda request: asked.append(request.url))
        await opened.goto(report.as_uri())
        assert await opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert await opened.evaluate(CUT_OFF) == []
        ink, soft, card, paper = await opened.evaluate(COLOURS)
        assert min(contrast(text, ground) for text in (ink, soft) for ground in (card, paper)) >= 4.5
        # Each figure is there once, drawn for this width.
        shown = await opened.locator("svg:visible").count()
        assert shown == await opened.locator("svg").count() / 2
        await opened.locator("#theme").click()
        assert await opened.evaluate(COLOURS) != [ink, soft, card, paper]
        assert problems == []
        assert asked == [report.as_uri()]
        await browser.close()
