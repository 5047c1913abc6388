"""Errors that an operator can fix, as a line each and an exit status."""

from __future__ import annotations

from typing import Any, Final

import click

from proxy.errors import ConfigError, HostError

EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h
EXIT_HOST: Final = 69  # EX_UNAVAILABLE


class FailuresAsLines(click.Group):
    """A group of commands whose expected errors end with one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            click.echo(f"warmpool: the configuration cannot be used\n{error}", err=True)
            ctx.exit(EXIT_CONFIG)
        except HostError as error:
            click.echo(f"warmpool: {error}", err=True)
            ctx.exit(EXIT_HOST)
