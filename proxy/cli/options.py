"""Options and arguments that several commands have, and what the shell completes them with."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from proxy.systemd import units

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

FILE_VARIABLE: Final = "WARMPOOL_CONFIG"
MODELS_VARIABLE: Final = "WARMPOOL_MODELS"
_MODEL_OF_ENVIRONMENT: Final = re.compile(rf"{MODELS_VARIABLE}__([A-Z][A-Z0-9_]*?)__.+", re.IGNORECASE)


def environment_has_models() -> bool:
    """Whether models are configured by the environment alone."""
    names = [name.upper() for name in os.environ]
    return any(name == MODELS_VARIABLE or name.startswith(f"{MODELS_VARIABLE}__") for name in names)


def chosen_file(named: Path | None) -> Path | None:
    """The configuration to use: the named one, else the installed one.

    None where there is neither, where the environment has the models, and where WARMPOOL_CONFIG is set to nothing.
    """
    if named is not None or FILE_VARIABLE in os.environ or environment_has_models():
        return named
    try:
        units.CONFIG.stat()
    except PermissionError:
        pass  # reading it says so
    except OSError:
        return None
    return units.CONFIG


def config_option(text: str) -> Callable[[F], F]:
    """`--config`, as `path`."""
    return click.option(
        "--config",
        "-c",
        "path",
        type=click.Path(path_type=Path),
        envvar=FILE_VARIABLE,
        callback=lambda _context, _option, named: chosen_file(named),
        help=f"{text}  [default: {units.CONFIG}]",
    )


CONFIG: Final = config_option("The TOML file to use.")
JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """Which running server is meant."""

    path: Path | None
    url: str | None
    token_file: Path | None


def server_options(command: F) -> F:
    """`--config`, `--url` and `--token-file`, as one argument `server`."""

    @functools.wraps(command)
    def chosen(*, path: Path | None, url: str | None, token_file: Path | None, **rest: Any) -> Any:
        return command(server=ServerChoice(path, url, token_file), **rest)

    by_url = click.option("--url", envvar="WARMPOOL_URL", help="The server's address, instead of the configuration's.")
    token = click.option(
        "--token-file",
        type=click.Path(path_type=Path),
        envvar="WARMPOOL_TOKEN_FILE",
        help="File with the admin token, instead of the configuration's.",
    )
    config = config_option("The TOML file that the server uses: its address and its admin token.")
    return config(by_url(token(chosen)))  # type: ignore[return-value]


def complete_models(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The keys of the models that the configuration names.

    Read without validating it: that costs the shell half a second, and more than the keys is not needed.
    """
    path = ctx.params.get("path") or chosen_file(Path(named) if (named := os.environ.get(FILE_VARIABLE)) else None)
    keys = {match[1].lower() for name in os.environ if (match := _MODEL_OF_ENVIRONMENT.fullmatch(name))}
    try:
        models = tomllib.loads(Path(path).read_text()).get("models", {}) if path else {}
    except (OSError, ValueError):
        models = {}
    keys.update(models if isinstance(models, dict) else ())
    return [CompletionItem(key) for key in sorted(keys) if key.startswith(incomplete)]


MODEL: Final = click.argument("model", shell_complete=complete_models)
ANY_MODEL: Final = click.argument("model", required=False, shell_complete=complete_models)
