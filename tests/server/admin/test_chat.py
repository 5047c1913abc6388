"""`/admin/chat/completions`: administrators ask a model without a key, and what they see of its wake meanwhile."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import EngineError
from proxy.pool import transitions
from proxy.pool.model import until_it_listens
from proxy.server.auth.administrator import NAME
from proxy.server.auth.api_keys import Entry
from tests.server.admin.test_requests import listed
from tests.server.auth.test_authorization import Keyed, keyed_of
from tests.server.test_http import error_of
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

__all__ = ["keyed_of"]

CHAT = "/admin/chat/completions"
SECRET = "a-prompt-that-nobody-may-see"
ASK = {"model": "demo", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8, "stream": True}
JSON = {"Content-Type": "application/json"}
TOKEN = "sesame-" * 6


def token_file(folder: Path) -> dict[str, str]:
    file = folder / "admin-token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return {"token_file": str(file)}


async def test_it_is_answered_by_the_model_and_listed_as_an_administrators(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    response, answer = await front.post(CHAT, ASK, headers=JSON)
    assert response.status == 200
    assert answer.endswith(b"data: [DONE]\n\n")
    assert response.headers["x-warmpool-tier"] == "stopped"
    (row,) = await listed(front)
    assert (row["key"], row["path"], row["model"], row["status"]) == (NAME, "/v1/chat/completions", "demo", 200)
    assert row["id"] == response.headers["x-request-id"]
    assert (await listed(front, f"?key={NAME}"))[0]["id"] == row["id"]
    assert SECRET not in caplog.text + str(await listed(front))


def test_no_key_can_have_its_name() -> None:
    with pytest.raises(ValueError, match="pattern"):
        Entry.model_validate({"name": NAME, "salt": "0" * 32, "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"})


async def test_pages_of_other_sites_and_forms_cannot_ask(front: Front) -> None:
    for headers, status in (
        ({**JSON, "Origin": "https://evil.example"}, 403),
        ({**JSON, "Sec-Fetch-Site": "cross-site"}, 403),
        ({**JSON, "Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "X-Forwarded-For": "192.0.2.1"}, 403),
        ({**JSON, "Host": "evil.example"}, 403),
    ):
        response, answer = await front.post(CHAT, ASK, headers=headers)
        assert response.status == status, (headers, answer)
    assert front.pool.status()["models"]["demo"]["instances"] == [], "nothing was woken"


async def test_what_is_wrong_is_an_error_in_the_envelope(front: Front) -> None:
    response, answer = await front.post(CHAT, {**ASK, "model": "nobody"}, headers=JSON)
    assert (response.status, error_of(answer)["code"]) == (404, "model_not_found")
    async with front.session.get(CHAT) as wrong:
        assert wrong.status == 405
    response, answer = await front.post("/admin/chat%2Fcompletions", ASK, headers=JSON)
    assert (response.status, error_of(answer)["code"]) == (404, "not_found")


async def test_with_keys_it_takes_the_admin_token(keyed_of: Any, tmp_path: Path) -> None:
    keyed: Keyed = await keyed_of(None, admin=token_file(tmp_path))
    front, admin = keyed.front, {"Authorization": f"Bearer {TOKEN}"}
    for headers in ({}, keyed["team"]):
        response, _ = await front.post(CHAT, ASK, headers={**JSON, **headers})
        assert response.status == 401
    response, _ = await front.post(CHAT, ASK, headers={**JSON, **admin})
    assert response.status == 200
    response, _ = await front.post("/v1/chat/completions", ASK, headers={**JSON, **admin})
    assert response.status == 401, "it is no key"
    async with front.session.get("/admin/status", headers=admin) as status:
        assert (await status.json())["chat_refusal"] is None


async def test_whether_one_may_is_asked_of_every_request(front: Front) -> None:
    """Of one whose head came before, too: another token is in force since."""
    for _ in range(2):
        response, _ = await front.post(CHAT, ASK, headers=JSON)
        assert response.status == 200
    front.auth.take((b"another-token-than-none", None), {})
    response, _ = await front.post(CHAT, ASK, headers=JSON)
    assert response.status == 401


async def test_loopback_alone_spares_nobody_a_key(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of(None, admin={})
    response, answer = await keyed.front.post(CHAT, ASK, headers=JSON)
    assert response.status == 403
    reason = (await get_json(f"{keyed.front.url}/admin/status"))["chat_refusal"]
    assert "server.admin.token_file" in reason
    assert error_of(answer)["message"] == reason
    assert keyed.front.pool.status()["models"]["demo"]["instances"] == [], "nothing was woken"


async def test_the_status_says_how_far_a_wake_is(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = asyncio.Event()

    async def held(*args: Any) -> None:
        await go_on.wait()
        await until_it_listens(*args)

    monkeypatch.setattr(transitions, "until_it_listens", held)
    async with front.session.get("/admin/events") as events:
        asked = asyncio.create_task(front.post(CHAT, ASK, headers=JSON))
        async with asyncio.timeout(PATIENCE_S):
            while b'"stage":"load"' not in await events.content.readline():
                pass  # told without being asked
    (instance,) = (await get_json(f"{front.url}/admin/status"))["models"]["demo"]["instances"]
    waking = instance["waking"]
    assert (instance["state"], waking["found"], waking["failed"]) == ("waking", "stopped", [])
    start, load = waking["stages"]
    assert (start["stage"], load["stage"], load["seconds"]) == ("start", "load", None)
    assert 0 < start["seconds"] <= load["start_s"]
    go_on.set()
    response, _ = await asked
    assert response.status == 200
    (instance,) = (await get_json(f"{front.url}/admin/status"))["models"]["demo"]["instances"]
    assert (instance["state"], instance["waking"]) == ("ready", None)
    assert "load" in instance["last_wake"]["stages"]


async def test_the_status_says_what_a_wake_has_tried_in_vain(front_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front: Front = await front_of(idle={"sleeping": "never", "suspended": "never", "checkpointed": "never"})
    await front.post(CHAT, ASK, headers=JSON)
    async with front.session.post("/admin/models/demo/suspend", json={}) as response:
        assert response.status == 200
    go_on = asyncio.Event()

    async def held(*args: Any) -> None:
        await go_on.wait()
        await until_it_listens(*args)

    monkeypatch.setattr(transitions, "until_it_listens", held)

    async def no_wake_up(*_: Any) -> None:
        raise EngineError("wake_up", "it does not")

    monkeypatch.setattr(transitions.Steps, "wake_up", no_wake_up)
    asked = asyncio.create_task(front.post(CHAT, ASK, headers=JSON))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            (instance,) = (await get_json(f"{front.url}/admin/status"))["models"]["demo"]["instances"]
            if instance["waking"] is not None and instance["waking"]["failed"]:
                break
            await asyncio.sleep(0.01)
    assert instance["waking"]["failed"][0].startswith("suspended: ")
    go_on.set()
    assert (await asked)[0].status == 200
