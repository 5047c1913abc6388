"""The documentation: links that lead somewhere; commands, options, settings, metrics and files that exist."""

from __future__ import annotations

import contextlib
import re
import shlex
import tomllib
from typing import TYPE_CHECKING, Any

import click
import pytest
from aiohttp.test_utils import make_mocked_request
from pydantic import BaseModel

from proxy import errors
from proxy.cli.main import cli
from proxy.config.load import RESERVED_ENV
from proxy.config.model import ModelSettings
from proxy.config.settings import ENV_DELIMITER, ENV_PREFIX, Settings
from proxy.errors import MethodNotAllowedError, ModelNotFoundError, RouteNotFoundError
from proxy.pool.instance import State
from proxy.server import app
from proxy.server.auth.authorization import CHAT
from proxy.server.forward import routes
from proxy.server.http_request import RequestHead
from proxy.telemetry.metrics import Metrics
from tests.fakes import Rig
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from proxy.server.service import Service

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("systemd/*.md"), *ROOT.glob("loadtest/*.md")})
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SHELLS = {"", "sh", "bash", "console", "shell"}
OLDER = {"CHANGELOG.md", "import-env.md"}
"""Pages that speak of names from elsewhere, or from before."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for match in FENCE.finditer(page.read_text()):
        if match[2] in languages:
            yield match[3]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return found


# --- links ---


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(
                r"(https?://[^\s/]+\.[^\s/]+(/\S*)?|http://(127\.0\.0\.1|localhost)[:/]\S*|mailto:\S+)", target
            )
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target} is not there"
        assert there.is_relative_to(ROOT), f"{name_of(page)}: {target} leads out of the project"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name_of(page)}: {target}: no such heading"


def test_every_page_can_be_found_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in LINK.findall(prose(page)):
            path = target.partition("#")[0]
            there = (page.parent / path).resolve()
            if path and ":" not in target and there.suffix == ".md" and there.exists():
                waiting.append(there)
    lost = [name_of(page) for page in PAGES if page not in seen and page.parent == ROOT / "docs"]
    assert lost == []


# --- commands ---


def said_commands(page: Path) -> Iterator[str]:
    """Command lines of shell blocks (what follows a prompt, if there are prompts) and commands within the text."""
    for block in blocks(page, *SHELLS):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        prompts = any(line.lstrip().startswith(("$ ", "# ")) for line in lines)
        for line in lines:
            text = line.strip()
            if not prompts or text.startswith(("$ ", "# ")):
                yield re.sub(r"^[$#] ", "", text)
    yield from INLINE.findall(prose(page))


def parts_of(command: str, program: str) -> list[str] | None:
    """The words of `program …` in a command line, without what a shell does with it."""
    command = re.sub(r"\s+#.*$", "", command.replace("…", "").replace("[", "").replace("]", ""))
    match = re.search(rf"(?:^|&& |\| |sudo |exec )(?:\S*/bin/)?{program}((?: .*)?)$", command)
    if match is None:
        return None
    try:
        words = shlex.split(re.split(r" (?:&&|\|\||[|<>;&]|2>) ?", match[1])[0])
    except ValueError:
        return None
    return words


def check_words(words: list[str]) -> str | None:
    """What is wrong with the words after `warmpool`."""
    command: click.Command = cli
    options = {"-h", "--help", "--version"}
    for word in words:
        if word == "--":
            break  # another program's
        name = word.partition("=")[0]
        if name.startswith("-") and name != "-":
            known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | options
            if name not in known:
                return f"{command.name} has no option {name}"
        elif isinstance(command, click.Group):
            inner = command.commands.get(word)
            if inner is None:
                return f"{command.name or 'warmpool'} has no command {word!r}"
            command = inner
    return None


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in said_commands(page):
        words = parts_of(command, "warmpool")
        if words is not None and not re.match(r"(is|listens|runs|could|has|itself|starts)\b", " ".join(words)):
            for alternative in _alternatives(words):
                wrong = check_words(alternative)
                assert wrong is None, f"{name_of(page)}: `{command}`: {wrong}"
        for word in parts_of(command, "make") or []:
            if "=" not in word and not word.startswith("-"):
                assert word in targets, f"{name_of(page)}: `{command}`: the Makefile has no target {word}"


def _alternatives(words: list[str]) -> list[list[str]]:
    """Stand-ins in capitals (MODEL, FILE) are arguments and no commands: nothing is to be checked of them."""
    return [[word for word in words if not re.fullmatch(r"[A-Z][A-Z_.]*", word)]]


# --- settings ---


def field_at(path: list[str]) -> Any:
    """The annotation of a key; None for one that there is not. Keys of free tables (`env`) end the path."""
    here: Any = Settings
    parts = list(path)
    while parts:
        part = parts.pop(0)
        if here is Settings and part == "models":
            if parts:
                parts.pop(0)
            here = ModelSettings
            continue
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            return here  # within a table of the user's own
        if part not in here.model_fields:
            return None
        annotation = here.model_fields[part].annotation
        here = next(iter(_models_in(annotation)), annotation)
    return here


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]


def keys_of(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*path, key)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from keys_of(item, (*path, key))


@each_page
def test_settings_exist(page: Path) -> None:
    for block in blocks(page, "toml"):
        if block.startswith("# ~/"):
            continue  # another program's
        for path in keys_of(tomllib.loads(block)):
            assert field_at(list(path)) is not None, f"{name_of(page)}: there is no key {'.'.join(path)}"
    if page.name in OLDER:
        return
    sections = "|".join(Settings.model_fields)
    for text in INLINE.findall(prose(page)):
        found = re.fullmatch(rf"\[*((?:{sections})(?:\.[A-Za-z_]+)*)\]*(?: = .*)?", text)
        if found is not None and "." in found[1] and not found[1].endswith((".py", ".md", ".toml")):
            assert field_at(found[1].split(".")) is not None, f"{name_of(page)}: there is no key {found[1]}"
        for name in re.findall(rf"\b{ENV_PREFIX}[A-Z_]+\b", text):
            key = name.removeprefix(ENV_PREFIX).lower().split(ENV_DELIMITER)
            known = name in RESERVED_ENV | {ENV_PREFIX} or name.endswith("_") or field_at(key) is not None
            assert known, f"{name_of(page)}: there is no variable {name}"


# --- routes, metrics, files ---


@each_page
async def test_routes_exist(page: Path) -> None:
    rig = Rig()
    service = app.build(rig.pool, rig.settings, rig.metrics)
    text = page.read_text()
    said = set(re.findall(r"`(GET|POST|DELETE) (/[\w/{}.-]*)", text))
    said |= {("", path) for path in re.findall(r"http://127\.0\.0\.1:8080(/[\w/-]*)", text)}
    for method, path in said:
        filled = re.sub(r"\{\w+\}", "wake", path)
        tried = [method] if method else ["GET", "POST"]
        found = [await is_route(service, m, filled) for m in tried]
        # A base URL that clients put a path behind is none itself.
        assert filled in ("/", "/v1") or any(found), f"{name_of(page)}: {path}"


async def is_route(service: Service, method: str, path: str) -> bool:
    """Of an engine, of warmpool's own, or of aiohttp's server."""
    with contextlib.suppress(RouteNotFoundError, MethodNotAllowedError):
        routes.find(method, "/v1/chat/completions" if path == CHAT else path)
        return True
    with contextlib.suppress(MethodNotAllowedError, ModelNotFoundError):
        if service.own_routes.answer(RequestHead(method, path, [], http11=True, length=0), None) is not None:
            return True
    match = await service.aiohttp.application.router.resolve(make_mocked_request(method, path))
    return match.http_exception is None


@each_page
def test_metrics_exist(page: Path) -> None:
    there = {f"{family.name}{end}" for family in Metrics().registry.collect() for end in ("", "_total", "_info")}
    for name in re.findall(r"`(warmpool_[a-z_]+)", page.read_text()):
        assert name in there or re.sub(r"_(bucket|sum|count)$", "", name) in there, f"{name_of(page)}: no metric {name}"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "config|docs|loadtest|systemd|tests|proxy"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path} is not there"


def test_nothing_tells_anybody_to_install_the_warmpool_of_package_indexes() -> None:
    """It is somebody else's, and ours is on none: it is installed from its sources or from a wheel made of them."""
    names = re.compile(r"\bwarmpool\[|\b(?:pip|pipx|uv|uvx)\b[^\n`]*[ '\"]warmpool(?:-proxy)?(?=['\"\[ `\n<>=]|$)")
    kinds = {".py", ".md", ".toml", ".sh", ".yml", ".service", ".html", ".js", ""}
    folders = ("proxy", "loadtest", "docs", "config", "systemd", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in kinds]
    files += [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    wrong = [f"{p.relative_to(ROOT)}: {m[0]}" for p in files for m in names.finditer(p.read_text())]
    assert wrong == []
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "warmpool-proxy"
    assert names.search("pip install 'warmpool[gpu]'")
    assert names.search("pip install warmpool\n")
    assert names.search("pip install 'warmpool-proxy[gpu]'")


def test_the_page_on_the_api_is_complete() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for family in Metrics().registry.collect():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        assert f"`{name}`" in text or name.startswith("process_"), f"{name} is not explained"
    for key in Rig().pool.status():
        assert f'"{key}"' in text or f"`{key}`" in text, f"{key} of the status is not explained"
    for state in State:
        assert f"`{state.value}`" in text or state is State.GONE, f"the state {state.value} is not explained"
    waiting: list[type[errors.RequestError]] = [errors.RequestError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.code is not None:
            assert f"`{kind.code}`" in text, f"the error {kind.code} is not explained"


# --- the checks themselves ---


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("warmpool wakee demo", "no command 'wakee'"),
        ("sudo warmpool checkpoint now demo --instanc demo-1", "no option --instanc"),
        ("warmpool config reference --format markdown > docs/reference.md", None),
        ("warmpool status --watch | head", None),
        ("/opt/warmpool/bin/warmpool serve --config warmpool.toml --log-formt json", "no option --log-formt"),
        ("warmpool checkpoint create MODEL", None),
        ("warmpool checkpoint made MODEL", "no command 'made'"),
    ],
)
def test_wrong_commands_are_found(command: str, wrong: str | None) -> None:
    words = parts_of(command, "warmpool")
    assert words is not None
    (words,) = _alternatives(words)
    found = check_words(words)
    assert (found is None) == (wrong is None)
    assert wrong is None or wrong in (found or "")


def test_wrong_settings_are_found() -> None:
    assert field_at(["server", "prot"]) is None
    assert field_at(["models", "demo", "podman", "criu", "tcp_closed"]) is None
    assert field_at(["models", "demo", "podman", "env", "HF_TOKEN"]) is not None
    assert field_at(["models", "NAME", "podman", "volumes", "source"]) is not None


def test_there_is_something_to_check() -> None:
    commands = [c for page in PAGES for c in said_commands(page) if parts_of(c, "warmpool")]
    assert len(commands) > 40
    assert sum(len([*blocks(page, "toml")]) for page in PAGES) > 5
