"""`warmpool routes`."""

from __future__ import annotations

import click


@click.command()
@click.argument("engine", required=False)
@click.pass_context
def routes(ctx: click.Context, engine: str | None) -> None:
    """List the routes of engines that clients may use.

    With ENGINE, the URL of a running engine (http://127.0.0.1:18100), compare them with its /openapi.json; exit status
    1 where it serves some that warmpool does not know.
    """
    from proxy.cli import route_comparison

    ctx.exit(0 if route_comparison.show(engine) else 1)
