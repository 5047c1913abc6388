"""What a key has used up: requests and tokens by the minute, and requests at once. Pure: the clock is handed in."""

from __future__ import annotations

from dataclasses import dataclass


class Bucket:
    """A token bucket: holds a minute's worth, fills evenly, and may be overdrawn, which later use pays back."""

    __slots__ = ("_level", "_per_s", "_since", "limit")

    def __init__(self, per_minute: int, now: float) -> None:
        self.limit = per_minute
        self._per_s = per_minute / 60
        self._level = float(per_minute)
        self._since = now

    def change(self, per_minute: int, now: float) -> None:
        """Another limit from now on; what was used stays used."""
        used = self.limit - self.level(now)
        self.limit, self._per_s = per_minute, per_minute / 60
        self._level = per_minute - used

    def level(self, now: float) -> float:
        """What may be used now; below 0 when overdrawn."""
        self._level = min(float(self.limit), self._level + (now - self._since) * self._per_s)
        self._since = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Use `amount`, which may be more than there is; below 0 gives back."""
        self._level = min(float(self.limit), self.level(now) - amount)

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until `amount` may be used; 0 when it may already."""
        return max(0.0, (amount - self.level(now)) / self._per_s)

    def left(self, now: float) -> tuple[int, float]:
        """What may be used now, in whole, and the seconds until it is full again."""
        level = self.level(now)
        return max(0, int(level)), (self.limit - level) / self._per_s


_REQUESTS, _TOKENS = (
    tuple(f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset")) for what in ("requests", "tokens")
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not begin, and when it might; None: nobody knows."""

    what: str
    limit: int
    retry_after_s: float | None


class Account:
    """What one key has in use and left."""

    __slots__ = ("concurrency", "elsewhere", "requests", "running", "tokens", "untold_requests", "untold_tokens")

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.concurrency: int | None = None
        self.running = 0
        self.elsewhere = 0
        """How many run on other hosts, where there are some."""
        self.untold_requests = self.untold_tokens = 0
        """What was used here that other hosts do not know of yet."""

    @property
    def is_limited(self) -> bool:
        """Whether the key has limits that other hosts have to know of."""
        return self.requests is not None or self.tokens is not None or self.concurrency is not None

    def told(self) -> tuple[int, int]:
        """Requests and tokens that were used here since this was asked last."""
        untold = self.untold_requests, self.untold_tokens
        self.untold_requests = self.untold_tokens = 0
        return untold

    def used_elsewhere(self, requests: int, tokens: int, now: float) -> None:
        """Count what was used on another host."""
        if self.requests is not None:
            self.requests.take(requests, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)

    def set_limits(
        self, requests_per_minute: int | None, tokens_per_minute: int | None, concurrency: int | None, now: float
    ) -> None:
        """The limits of the file, at start and whenever it was read again."""
        self.requests = _changed(self.requests, requests_per_minute, now)
        self.tokens = _changed(self.tokens, tokens_per_minute, now)
        self.concurrency = concurrency

    def begin(self, now: float) -> Refusal | None:
        """Take up a request, or say why not.

        A request may begin as long as there is one token left, so that a large one is not refused for ever.
        """
        if self.concurrency is not None and self.running + self.elsewhere >= self.concurrency:
            return Refusal("requests at once", self.concurrency, None)
        if self.requests is not None and (wait_s := self.requests.seconds_until(1.0, now)) > 0:
            return Refusal("requests per minute", self.requests.limit, wait_s)
        if self.tokens is not None and (wait_s := self.tokens.seconds_until(1.0, now)) > 0:
            return Refusal("tokens per minute", self.tokens.limit, wait_s)
        if self.requests is not None:
            self.requests.take(1.0, now)
        self.untold_requests += 1
        self.running += 1
        return None

    def expect(self, tokens: int, now: float) -> None:
        """Take what a request that was begun may cost; `end` puts that right."""
        self.untold_tokens += tokens
        if self.tokens is not None:
            self.tokens.take(tokens, now)

    def end(self, expected_tokens: int, used_tokens: int, now: float) -> None:
        """A request that was begun is over."""
        self.running -= 1
        self.untold_tokens += used_tokens - expected_tokens
        if self.tokens is not None:
            self.tokens.take(used_tokens - expected_tokens, now)

    def undo(self, expected_tokens: int, now: float) -> None:
        """A request that was begun has not been."""
        if self.requests is not None:
            self.requests.take(-1.0, now)
        self.untold_requests -= 1
        self.end(expected_tokens, 0, now)

    def headers(self, now: float) -> dict[str, str]:
        """`x-ratelimit-*` as OpenAI's API has them, for the limits there are."""
        found = {}
        for bucket, (limit, remaining, reset) in ((self.requests, _REQUESTS), (self.tokens, _TOKENS)):
            if bucket is not None:
                left, full_s = bucket.left(now)
                found[limit] = str(bucket.limit)
                found[remaining] = str(left)
                found[reset] = f"{full_s:.3f}s"
        return found


def _changed(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    if bucket.limit != per_minute:
        bucket.change(per_minute, now)
    return bucket
