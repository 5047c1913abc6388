"""One request's hold on an instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Protocol, Self

from proxy.pool.instance import State

if TYPE_CHECKING:
    from types import TracebackType

    from proxy.pool.instance import Instance, WakeRecord
    from proxy.tiers import Tier


_STANDING: Final = frozenset({State.PAUSING, State.PAUSED, State.UNPAUSING})


class _Lender(Protocol):
    """Who gives leases."""

    def lease_ended(
        self, instance: Instance, generation: int, keep_s: float | None = None, key: str | None = None
    ) -> None: ...

    def lease_charged(self, instance: Instance, generation: int, key: str) -> None: ...

    def token_came(self, instance: Instance, generation: int) -> None: ...

    async def examine(self, instance: Instance, generation: int) -> None: ...


class Lease:
    """One request's hold on an instance. `async with` it, or call `release` in `finally`; further calls do nothing."""

    __slots__ = (
        "_awaits_token", "_instance", "_key", "_pool", "client", "found", "generation", "instance_id", "keep_s",
        "model", "queue_s", "wake",
    )  # fmt: skip

    is_remote: ClassVar[bool] = False
    """It is of another host."""

    def __init__(self, pool: _Lender, instance: Instance, found: Tier, queue_s: float, wake: WakeRecord | None) -> None:
        assert instance.client is not None  # noqa: S101 - ready instances have one
        self._pool: _Lender | None = pool
        self._instance = instance
        self._awaits_token = False
        self._key: str | None = None
        self.client = instance.client
        self.model = instance.model
        self.instance_id = instance.id
        self.generation = instance.generation
        self.found = found
        """What the request found when it came."""
        self.queue_s = queue_s
        """How long it waited, beside the wake."""
        self.wake = wake
        """The wake it waited for, if it did."""
        self.keep_s: float | None = None
        """For how long its client wants the instance to stay ready afterwards, if it said so."""

    @property
    def paused(self) -> bool:
        """Whether the instance's requests stand still."""
        return self._instance.state in _STANDING

    def charge(self, key: str) -> None:
        """Its time on the GPU is that of a key, by its name; once."""
        if self._pool is not None and self._key is None:
            self._pool.lease_charged(self._instance, self.generation, key)
            self._key = key

    @property
    def on_hold(self) -> bool:
        """Whether they do because an operator wants it."""
        return self._instance.on_hold

    def await_token(self) -> None:
        """It is for a stream: its engine should not be paused before that has a token."""
        if not self._awaits_token and self._pool is not None and self._instance.generation == self.generation:
            self._awaits_token = True
            self._instance.await_token()

    def token_came(self) -> None:
        """The stream has its first token, or will get none; further calls do nothing."""
        if self._awaits_token and self._pool is not None:
            self._awaits_token = False
            self._pool.token_came(self._instance, self.generation)

    def release(self) -> None:
        """Give the instance back."""
        if self._awaits_token:
            self.token_came()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.lease_ended(self._instance, self.generation, self.keep_s, self._key)

    async def suspect(self) -> None:
        """Say that the engine failed the request; the pool looks, and breaks the instance if it does not serve."""
        if self._pool is not None:
            await self._pool.examine(self._instance, self.generation)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
