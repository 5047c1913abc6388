"""`warmpool engine`: what an engine offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from proxy.cli.failures import Commands
from proxy.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from proxy.engine.probe import Probed


@click.group(cls=Commands)
def engine() -> None:
    """Ask running engines."""


@engine.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "json"]),
    default="text",
    show_default=True,
    help="How it is printed.",
)
@click.option("--try", "tried", is_flag=True, help="Put them to sleep and wake them, too; their clients notice.")
@click.option("--api-key-file", type=click.Path(dir_okay=False), help="The file with the API key of the engines.")
def probe(urls: tuple[str, ...], form: str, *, tried: bool, api_key_file: str | None) -> None:
    """Show what running engines offer: sleep mode, pauses, routes, metrics.

    URL is that of an engine itself (http://127.0.0.1:18100), not of warmpool. Several are shown side by side. Nothing
    is changed, but for --try.
    """
    import asyncio
    from pathlib import Path

    from proxy.engine.probe import Prober
    from proxy.server.forward.routes import ROUTES

    key = _read(Path(api_key_file)) if api_key_file is not None else None
    listed = [(route.method, route.path) for route in ROUTES if not route.websocket]

    async def ask() -> list[Probed]:
        return [await Prober(url, key).probe(listed, sleep=tried) for url in urls]

    found = asyncio.run(ask())
    known = {*listed}
    if form == "json":
        import orjson

        shown = [
            {
                "url": one.url,
                **one.facts,
                "routes": [{"method": m, "path": p, "listed": (m, p) in known} for m, p in one.routes],
            }
            for one in found
        ]  # fmt: skip
        click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2))
        return
    for line in _table(found, known, markdown=form == "markdown"):
        click.echo(line)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error


def _table(found: Sequence[Probed], known: set[tuple[str, str]], *, markdown: bool) -> Iterator[str]:
    rows = [["", *(one.url for one in found)]]
    rows += [[name, *(one.facts[name] for one in found)] for name in found[0].facts]
    for title, wanted in (("routes that clients may use", True), ("further routes", False)):
        cells = [", ".join(dict.fromkeys(p for m, p in one.routes if ((m, p) in known) is wanted)) for one in found]
        rows.append([title, *(cell or "none" for cell in cells)])
    if markdown:
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
        for row in rows[1:]:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        return
    width = max(len(row[0]) for row in rows)
    for row in rows:
        for number, cell in enumerate(row[1:]):
            yield f"{row[0] if not number else '':<{width}}  {cell}"
