"""`warmpool man`: the manual page, written from the commands themselves, as --help is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import click

from proxy import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

_TAIL: Final = r"""
.SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
It failed, or the server refused it; the reason is on standard error.
.TP
.B 2
The command line is wrong.
.TP
.B 69
This host lacks something, the port is in use, or no server answers.
.TP
.B 78
The configuration cannot be used; each problem is a line with file, line and key.
.SH ENVIRONMENT
.TP
.B WARMPOOL_CONFIG
The TOML file, where
.B \-\-config
names none.
.TP
.B WARMPOOL_URL, WARMPOOL_TOKEN_FILE
The server that commands talk to, and the file with its admin token.
.TP
.B WARMPOOL_...
Every key of the configuration: its path in capitals, joined by two underscores, as in WARMPOOL_SERVER__PORT.
.SH FILES
.TP
.I /etc/warmpool/warmpool.toml
The configuration of the installed service.
.TP
.I /var/lib/warmpool
Its state: logs of engines, and records.
"""


@click.command()
@click.pass_context
def man(ctx: click.Context) -> None:
    """Show the manual page, or print its source where the output is not a terminal.

    After `make install`, `man warmpool` shows it too, where PATH has the folder of the command.

    \b
    warmpool man > /usr/local/share/man/man1/warmpool.1
    """
    text = page(ctx.find_root().command)
    if sys.stdout.isatty() and (program := shutil.which("man")):
        subprocess.run([program, "-l", "-"], input=text, text=True, check=False)
        return
    click.echo(text, nl=False)


def page(root: click.Command) -> str:
    """The manual page of a command and all below it, for man(7)."""
    ctx = click.Context(root, info_name="warmpool")
    about = (root.help or "").strip()
    lines = [
        f'.TH WARMPOOL 1 "" "warmpool {__version__}" "User Commands"',
        ".SH NAME",
        f"warmpool \\- {_text(about.rstrip('.')[:1].lower() + about.rstrip('.')[1:])}",
        ".SH SYNOPSIS",
        r"\fBwarmpool\fR [\fIOPTIONS\fR] \fICOMMAND\fR [\fIARGS\fR]...",
        ".SH OPTIONS",
        *_options(ctx, root),
        ".SH COMMANDS",
        *_commands(ctx, root),
    ]
    return "\n".join(lines) + _TAIL


def _commands(ctx: click.Context, group: click.Command) -> Iterator[str]:
    assert isinstance(group, click.Group)  # noqa: S101 - only groups have commands
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is None or command.hidden:
            continue
        inner = click.Context(command, info_name=name, parent=ctx)
        if isinstance(command, click.Group):
            yield from _commands(inner, command)
            continue
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        yield f'.SS "{_text(usage)}"'
        yield from _paragraphs(command.help or "")
        yield from _options(inner, command)


def _options(ctx: click.Context, command: click.Command) -> Iterator[str]:
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None and record[1] and "--help" not in record[0]:
            yield ".TP"
            yield f".B {_text(record[0])}"
            yield _text(record[1])


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield ".PP"
        if paragraph.startswith("\b\n"):
            yield ".nf"
            yield from (_text(line) for line in paragraph.splitlines()[1:])
            yield ".fi"
        else:
            yield _text(" ".join(paragraph.split()))


def _text(text: str) -> str:
    """Text of ours as roff: nothing in it is a request or an escape."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace('"', r"\(dq").replace("`", r"\(ga")
    return re.sub(r"^([.'])", r"\\&\1", escaped)
