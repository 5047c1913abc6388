"""The command `warmpool`: arguments, logging, wiring. The only module that names concrete runtimes."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import tomli_w
import uvloop

from proxy import __version__
from proxy.checkpoint.store import CheckpointStore
from proxy.cli import checkpoint, control, install, key, route_check
from proxy.config import import_env as importenv
from proxy.config import reference, reference_page
from proxy.config.load import load
from proxy.config.masking import masked
from proxy.config.runtime import RuntimeSettings
from proxy.doctor import examination, report
from proxy.doctor.view import Host
from proxy.errors import ConfigError, HostError
from proxy.gpu.cuda import Gpus
from proxy.host import facts
from proxy.pool.pool import Pool
from proxy.pool.usage import Usage
from proxy.runtime.podman.runtime import PodmanRuntime
from proxy.runtime.process.runtime import ProcessRuntime
from proxy.runtime.state_dir import Claim, of_earlier_version
from proxy.server import server
from proxy.server.last_resort import LastResort
from proxy.telemetry import logs
from proxy.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from proxy.config.settings import Settings
    from proxy.runtime.base import Runtime

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
EXIT_HOST = 69  # EX_UNAVAILABLE
_EXIT_S = 5.0
"""How long the interpreter may take to end after the server has."""

_CONFIG_OPTION = click.option(
    "--config", "-c", "path", type=click.Path(path_type=Path), envvar="WARMPOOL_CONFIG", help="The TOML file to use."
)


class _Failures(click.Group):
    """Turns the errors an operator can mend into one line each and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            click.echo(f"warmpool: the configuration cannot be used\n{error}", err=True)
            ctx.exit(EXIT_CONFIG)
        except HostError as error:
            click.echo(f"warmpool: {error}", err=True)
            ctx.exit(EXIT_HOST)


@click.group(cls=_Failures, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="warmpool")
def cli() -> None:
    """An OpenAI-compatible proxy in front of engines that are mostly not running."""


@cli.command()
@_CONFIG_OPTION
@click.option(
    "--log-format",
    type=click.Choice(["auto", *logs.FORMATS]),
    default="auto",
    show_default=True,
    help="Lines for people, JSON objects, or lines with a priority for systemd's journal; auto: journal there, else "
    "text.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="The least important lines to log.",
)
def serve(path: Path | None, log_format: str, log_level: str) -> None:
    """Run the proxy until SIGTERM or Ctrl-C."""
    settings = load(path)
    logs.to_stderr(log_format, log_level)
    if earlier := of_earlier_version(settings.pool.state_dir.absolute(), Path.cwd()):
        logging.getLogger("warmpool").warning(earlier)
    metrics = Metrics()
    gpus = Gpus()
    usage = Usage(settings.pool.state_dir / "usage.json")
    usage.load()
    pool = Pool(settings, _runtimes(settings, gpus), metrics, gpus=gpus, usage=usage, memory=facts.memory)
    # What is here stays, and requests leave hardly a cycle: looking for them as often as Python does by default takes a
    # tenth of a request's time.
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)
    last_resort = LastResort()

    async def run() -> None:
        try:
            await server.serve(pool, settings, metrics, load=lambda: load(path), usage=usage, last_resort=last_resort)
        except HostError as error:
            last_resort.within(_EXIT_S, EXIT_HOST, f"warmpool: {error}")
            raise
        finally:
            # Event loop and interpreter wait for tasks and threads, which may hang.
            last_resort.within(_EXIT_S)

    try:
        uvloop.run(run())
    finally:
        gpus.close()


@cli.group("config")
def config_group() -> None:
    """Look at configurations."""


@config_group.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Say whether FILE can be used here, with every problem if not (exit status 78)."""
    settings = load(file)
    server.check_files(settings.server)
    click.echo(f"{file}: good; models: {', '.join(settings.names())}")


@config_group.command()
@_CONFIG_OPTION
def show(path: Path | None) -> None:
    """Print the values in effect, file and environment together, as TOML; secrets are masked."""
    click.echo(tomli_w.dumps(masked(load(path).model_dump(mode="json"))), nl=False)


@config_group.command("import-env")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Write this new file, mode 0600, instead of printing."
)
def import_env(file: Path, output: Path | None) -> None:
    """Turn FILE, the .env of the scripts, into a configuration."""
    converted = importenv.convert(file)
    for warning in converted.warnings:
        click.echo(f"warmpool: {file}: {warning}", err=True)
    if output is None:
        click.echo(converted.toml, nl=False)
        return
    try:
        importenv.write_new(output, converted.toml)
    except OSError as error:
        raise click.FileError(str(output), hint=error.strerror) from None


@config_group.command("reference")
@click.option(
    "--format",
    "form",
    type=click.Choice(["toml", "markdown"]),
    default="toml",
    show_default=True,
    help="A file to start from, or the tables of docs/reference.md.",
)
def reference_(form: str) -> None:
    """Print every key, its meaning and its default."""
    click.echo(reference.reference() if form == "toml" else reference_page.page(), nl=False)


def _store(settings: Settings) -> CheckpointStore:
    pool = settings.pool
    return CheckpointStore(pool.checkpoint_dir, pool.checkpoint_reserve, pool.archive_dir)


def _runtimes(settings: Settings, gpus: Gpus | None = None) -> dict[str, Runtime]:
    store, claim = _store(settings), Claim(settings.pool.state_dir, log_size=settings.pool.engine_log_size)
    programs = [m.podman.criu.program for m in settings.models.values() if m.podman and m.podman.criu.program]
    gpus = gpus or Gpus()
    return {
        "process": ProcessRuntime(settings.runtime.process, claim=claim, store=store, gpus=gpus),
        "podman": PodmanRuntime(settings.runtime.podman, claim=claim, store=store, criu_programs=programs, gpus=gpus),
    }


@cli.command()
@_CONFIG_OPTION
@click.option("--fix", is_flag=True, help="Do what is safe to do; says what before.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_context
def doctor(ctx: click.Context, path: Path | None, fix: bool, as_json: bool) -> None:
    """Say what this host lacks for checkpoints and how to mend it; exit status 1 when they cannot work."""
    settings = load(path) if path is not None else None
    runtimes = settings.runtime if settings is not None else RuntimeSettings()

    def make(name: str, claim: Claim, store: CheckpointStore) -> Runtime:
        if name == "podman":
            return PodmanRuntime(runtimes.podman, claim=claim, store=store)
        return ProcessRuntime(runtimes.process, claim=claim, store=store)

    diagnosis = asyncio.run(
        examination.diagnose(settings, Host(), make, fix=fix, tell=lambda text: click.echo(text, err=as_json))
    )
    if as_json:
        click.echo(report.as_json(diagnosis.checks, diagnosis.self_test))
    else:
        report.render(diagnosis.checks, diagnosis.self_test, sys.stdout)
    ctx.exit(diagnosis.exit_status())


_checkpoint = checkpoint.group(checkpoint.Wiring(_store, _runtimes))
_checkpoint.add_command(control.checkpoint_now)
cli.add_command(_checkpoint)
for _command in (
    *control.COMMANDS,
    install.install_,
    install.uninstall,
    key.key,
    route_check.routes,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the command."""
    cli(prog_name="warmpool")
