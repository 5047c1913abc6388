"""The group that commands are in: errors that an operator can fix end with a line each and an exit status."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from proxy.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h
EXIT_HOST: Final = 69  # EX_UNAVAILABLE
_EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as of shells
_UNCUT: Final = 10_000


class Commands(click.Group):
    """A group of commands: all errors begin with `warmpool: `, and no line of its help is cut off."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """As of click, but for how errors look. Only the outermost group is entered here."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            status = super().main(args, standalone_mode=False, **extra)
        except click.Abort:
            click.echo("warmpool: interrupted", err=True)
            sys.exit(_EXIT_INTERRUPTED)
        except click.ClickException as error:
            click.echo(f"warmpool: {_sentence(error)}", err=True)
            if isinstance(error, click.UsageError) and error.ctx is not None:
                click.echo(error.ctx.get_usage(), err=True)
                click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)
            sys.exit(error.exit_code)
        except ConfigError as error:
            click.echo(f"warmpool: the configuration cannot be used\n{error}", err=True)
            sys.exit(EXIT_CONFIG)
        except HostError as error:
            click.echo(f"warmpool: {error}", err=True)
            sys.exit(EXIT_HOST)
        sys.exit(status if isinstance(status, int) else 0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each command with the whole of its first sentence."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(_UNCUT)) for name, command in found if command and not command.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _sentence(error: click.ClickException) -> str:
    """What is wrong, beginning as our own errors do."""
    message = error.format_message()
    return message if message[1:2].isupper() else f"{message[:1].lower()}{message[1:]}"
