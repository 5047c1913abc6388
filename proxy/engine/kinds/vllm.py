"""vLLM: its sleep mode, its pauses, and what warmpool runs inside it.

In its development mode (VLLM_SERVER_DEV_MODE=1) it has `/sleep?level=`, `/wake_up?tags=`, `/is_sleeping`,
`/collective_rpc`, `/pause?mode=`, `/resume` and `/is_paused` (vllm/entrypoints/serve).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final, Literal

from proxy.engine.client import DIGITS, EngineClient, as_json, excerpt
from proxy.engine.kinds.vllm_inside import VllmInside
from proxy.engine.vllm_extension.warmpool_vllm.frontend import PATH
from proxy.errors import EngineError, Fault, NoRoomError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from proxy.config.model import ModelSettings
    from proxy.engine.kinds.base import ClientOptions
    from proxy.telemetry.stages import Stages

log = logging.getLogger("warmpool.engine")

_AGAIN_S = 0.1
_RESEED_S: Final = 30.0
"""How long its workers may take, some of whose memory is touched for the first time since the restore."""


class Vllm:
    """vLLM, which gets a worker extension and a middleware of warmpool's."""

    name: Final = "vllm"
    spec: Final = ("vllm",)
    inside: Final = VllmInside()

    def connect(
        self, base_url: str, served_name: str, model: ModelSettings, **options: Unpack[ClientOptions]
    ) -> VllmClient:
        """A client of one engine."""
        return VllmClient(base_url, served_name, own_worker_extension=model.own_worker_extension, **options)

    def reseed_gap(self, model: ModelSettings) -> str | None:
        """None where its workers take warmpool's extension."""
        return _own_extension(model.own_worker_extension)

    def reseeds(self, model: ModelSettings) -> bool:  # noqa: ARG002 - a contract
        """Always: its API server at least."""
        return True


class VllmClient(EngineClient):
    """A client of vLLM; `own_worker_extension`: the option by which it has one that is not warmpool's."""

    def __init__(self, *arguments: Any, own_worker_extension: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._own_worker_extension = own_worker_extension

    async def is_sleeping(self) -> bool | None:
        """Whether the engine sleeps; None when it has no sleep mode (its development endpoints are closed)."""
        status, body = await self._call("probe", "GET", "/is_sleeping")
        answer = as_json(body)
        if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("is_sleeping"), bool):
            return None
        return bool(answer["is_sleeping"])

    async def sleep(self, level: int) -> None:
        """Put the engine to sleep: level 1 keeps the weights in host RAM, level 2 drops them."""
        await self._command("sleep", f"/sleep?level={level}")

    async def save_weights(self) -> int:
        """Have its workers keep a copy of their weights; its bytes. See proxy/engine/vllm_extension."""
        return await self._bytes("save_weights", "warmpool_save_weights")

    async def can_pause(self) -> Literal["never", "without a copy of its weights", "yes"]:
        """Whether its requests can stand still with nothing of them on the GPU, as far as the engine says.

        Only for an engine with warmpool's extension. "without a copy…": there is none that fits; with one it can.
        """
        if await self.is_paused() is None:
            return "never"
        try:
            results = await self._workers("probe", "warmpool_can_pause")
        except EngineError as error:
            log.info("%s cannot pause: %s", self.base_url, error)
            return "never"
        return "yes" if all(result.get("copy") is True for result in results) else "without a copy of its weights"

    async def is_paused(self) -> bool | None:
        """Whether its scheduler is paused; None where the engine knows no pauses."""
        status, body = await self._call("probe", "GET", "/is_paused")
        answer = as_json(body)
        if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("is_paused"), bool):
            return None
        return bool(answer["is_paused"])

    async def pause(self, stages: Stages) -> int:
        """Have its requests stand still, and take their state and the weights off the GPU; bytes in host memory.

        When that fails, `unpause` is the way back.
        """
        with stages.measure("pause"):
            await self._command("pause", "/pause?mode=keep&clear_cache=false")
        self.upstream.stand_still()
        with stages.measure("save_cache"):
            return await self._bytes("pause", "warmpool_pause")

    async def unpause(self, stages: Stages) -> bool:
        """Bring all that back, and let its requests go on; False where the copy of the weights did not fit.

        Right in whatever state a pause left it. Without room on the GPU it is tried again: bounded by the caller.
        """
        with stages.measure("load_cache"):
            while any(result.get("again") for result in await self._workers("unpause", "warmpool_unpause", again=True)):
                await asyncio.sleep(_AGAIN_S)
        good = await self._load_copy(stages)
        if not good:
            with stages.measure("reload_weights"):
                await self._command("reload_weights", "/collective_rpc", json={"method": "reload_weights"})
        with stages.measure("unpause"):
            await self._command("unpause", "/resume")
        self.upstream.go_on()
        return good

    async def end_pauses(self) -> None:
        """Have its workers give back what they keep for the next pause."""
        await self._workers("end_pauses", "warmpool_end_pauses")

    async def _bytes(self, stage: str, method: str) -> int:
        return sum(result["bytes"] for result in await self._workers(stage, method, must_have="bytes"))

    async def _workers(
        self, stage: str, method: str, *, must_have: str | None = None, again: bool = False
    ) -> list[dict[str, Any]]:
        """What a method of the extension answers, of each worker. Raises EngineError.

        `again`: an error that may not be one if it is asked again is returned.
        """
        status, body = await self._call(stage, "POST", "/collective_rpc", json={"method": method})
        answer = as_json(body)
        results = answer.get("results") if isinstance(answer, dict) else None
        if status != 200 or not isinstance(results, list) or not results:
            raise EngineError(stage, f"POST /collective_rpc answered {status} {excerpt(body)}", fault=Fault.IMAGE)
        for result in results:
            missing = must_have is not None and isinstance(result, dict) and not isinstance(result.get(must_have), int)
            failed = not isinstance(result, dict) or "error" in result or missing
            if failed and not (again and isinstance(result, dict) and result.get("again")):
                reason = result.get("error") if isinstance(result, dict) else result
                kind = NoRoomError if str(reason).startswith("MemoryError") else EngineError
                raise kind(stage, f"{method}: {str(reason)[:300]}", fault=Fault.IMAGE)
        return results

    async def wake_up(self, level: int, stages: Stages, *, copied: bool = False) -> bool:
        """Wake an engine that sleeps at `level`; after level 2 the weights are loaded again.

        `copied`: from the copy of `save_weights`; where that fails, as the engine does it. False says that it failed.
        """
        if level < 2:
            with stages.measure("wake_up"):
                await self._command("wake_up", "/wake_up")
            return True
        with stages.measure("wake_up"):
            await self._command("wake_up", "/wake_up?tags=weights")
        good = not copied or await self._load_copy(stages)
        if not copied or not good:
            with stages.measure("reload_weights"):
                await self._command("reload_weights", "/collective_rpc", json={"method": "reload_weights"})
        with stages.measure("wake_up"):
            await self._command("wake_up", "/wake_up?tags=kv_cache")
        return good

    async def _load_copy(self, stages: Stages) -> bool:
        try:
            with stages.measure("load_weights"):
                await self._bytes("load_weights", "warmpool_load_weights")
        except EngineError as error:
            log.warning("%s: the copy of the weights cannot be used, they are loaded again: %s", self.base_url, error)
            return False
        return True

    async def _command(self, stage: str, path: str, json: Mapping[str, Any] | None = None) -> None:
        status, body = await self._call(stage, "POST", path, json=json)
        if status != 200:
            raise EngineError(stage, f"POST {path} answered {status} {excerpt(body)}", fault=Fault.IMAGE)

    # --- fresh randomness, through what runs inside it ---

    async def reseed_gap(self) -> str | None:
        """What its API server says of its workers."""
        if (gap := _own_extension(self._own_worker_extension)) is not None:
            return gap
        async with self.limit("reseed", _RESEED_S):
            status, answer = await self.ask_json("reseed", "GET", PATH)
        return _reason(status, answer)

    async def reseed(self) -> str | None:
        """Begin the generators of its API server and its workers anew."""
        digits = secrets.token_hex(DIGITS)
        async with self.limit("reseed", _RESEED_S):
            status, answer = await self.ask_json("reseed", "POST", PATH, digits.encode())
        return _reason(status, answer)


def _own_extension(option: str | None) -> str | None:
    return None if option is None else f"its command has a worker extension of its own ({option})"


def _reason(status: int, answer: object) -> str | None:
    """What vLLM's answer says of its workers. Raises EngineError."""
    if status in (404, 405):
        return "it did not take the arguments that warmpool added to its command: is that vLLM's own?"
    if status != 200 or not isinstance(answer, dict):
        said = answer.get("error") if isinstance(answer, dict) else None
        raise EngineError("reseed", f"{PATH} answered {status}: {str(said)[:300]}")
    reason = answer.get("reason")
    return str(reason)[:300] if reason is not None else None
