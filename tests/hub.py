"""A Hugging Face hub for tests: the part of its HTTP API that huggingface_hub uses to fetch a repository."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Has repositories by name, each with files by path; some want a token, some an agreement."""

    def __init__(
        self, repositories: Mapping[str, Mapping[str, bytes]], *, token: str | None = None, gated: bool = False
    ):
        self.repositories = repositories
        self.token = token
        self.gated = gated
        self.fetched: list[str] = []
        """Paths of files whose bytes were sent."""
        self.break_off: set[str] = set()
        """Files of which the first answer ends half-way."""

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/models/{owner}/{name}", self._info)
        app.router.add_get("/api/models/{owner}/{name}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", self._tree)
        app.router.add_route("*", "/{owner}/{name}/resolve/{revision}/{path:.+}", self._file)
        return app

    def _files(self, request: web.Request) -> Mapping[str, bytes]:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise _error(401, "GatedRepo" if self.gated else "RepoNotFound")
        if name not in self.repositories:
            raise _error(401, "RepoNotFound")
        if request.match_info.get("revision", "main") not in ("main", COMMIT):
            raise _error(404, "RevisionNotFound")
        return self.repositories[name]

    async def _info(self, request: web.Request) -> web.Response:
        files = self._files(request)
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        return web.json_response({"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings})

    async def _tree(self, request: web.Request) -> web.Response:
        entries = [
            {"type": "file", "oid": _etag(content), "size": len(content), "path": path}
            for path, content in self._files(request).items()
        ]
        return web.json_response(entries)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        content = self._files(request).get(path)
        if content is None:
            raise _error(404, "EntryNotFound")
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(request.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")[0])
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(content))})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.fetched.append(path)
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        response.content_length = len(content) - start
        await response.prepare(request)
        if path in self.break_off:
            self.break_off.discard(path)
            await response.write(content[start : start + len(content) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(content[start:])
        return response


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _error(status: int, code: str) -> web.HTTPException:
    kinds: dict[int, Any] = {401: web.HTTPUnauthorized, 404: web.HTTPNotFound}
    error: web.HTTPException = kinds[status](headers={"X-Error-Code": code, "X-Error-Message": code})
    return error
