"""An engine with continuous batching, in virtual time: what a request of so many tokens takes beside so many others.

A step of the engine gives every stream that decodes one token and takes `step_s` and `stream_s` for each of them;
while prompts are there, a step also takes in `chunk_tokens` of them, the first one's first (vLLM's chunked prefill).
Between two events all rates are constant, so that nothing is computed step by step: streams end in the order of the
tokens that each would have by then.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtest.simulate_pool import Ask


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a model is on its GPU."""

    step_s: float
    """One step with nothing in it: the weights are read once."""
    stream_s: float
    """What each decoding stream adds to a step."""
    prompt_tokens_per_s: float
    chunk_tokens: int = 2048
    streams: int = 256
    """The most that run at once."""
    shares: bool = True
    """Engines that run beside one another have the GPU's time in equal parts; the load-test engine needs no GPU."""

    def alone_s(self, prompt_tokens: int) -> float:
        """The time to the first token of a request that has the engine to itself."""
        return prompt_tokens / self.prompt_tokens_per_s + self.step_s * max(1.0, prompt_tokens / self.chunk_tokens)

    def work_s(self, prompt_tokens: int, tokens: int) -> float:
        """What a request takes of an engine that is full: its share of the steps."""
        return prompt_tokens / self.prompt_tokens_per_s + tokens * (self.step_s / self.streams + self.stream_s)


class Batch:
    """The requests of one engine."""

    __slots__ = ("_at", "_decoded", "_decoding", "_left", "_prompts", "_serial", "_share", "_speed", "_still", "busy_s")

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._decoding: list[tuple[float, int, Ask]] = []
        """(how many tokens every stream will have had when this one ends, …)."""
        self._prompts: deque[Ask] = deque()
        self._left = 0.0
        """Tokens of the first prompt that are not taken in yet."""
        self._decoded = 0.0
        """Tokens that a stream has had that decodes since the beginning."""
        self._at = 0.0
        self._still = False
        self._share = 1.0
        self._serial = 0
        self.busy_s = 0.0
        """GPU time that it had."""

    def _rates(self) -> tuple[float, float]:
        """Tokens in a second: of each stream, and of prompts."""
        speed = self._speed
        step_s = speed.step_s + len(self._decoding) * speed.stream_s
        if not self._prompts:
            return self._share / step_s, 0.0
        step_s += speed.chunk_tokens / speed.prompt_tokens_per_s
        return self._share / step_s, self._share * speed.chunk_tokens / step_s

    def advance(self, now: float) -> None:
        """Let time go on."""
        passed_s, self._at = now - self._at, now
        if self._still or passed_s <= 0 or not (self._decoding or self._prompts):
            return
        decoded, taken_in = self._rates()
        self._decoded += passed_s * decoded
        self._left -= passed_s * taken_in
        self.busy_s += passed_s * self._share

    def next_s(self) -> float:
        """When something happens by itself next; infinity where nothing does."""
        if self._still or not (self._decoding or self._prompts):
            return math.inf
        decoded, taken_in = self._rates()
        soonest = math.inf
        if self._decoding:
            soonest = max(0.0, self._decoding[0][0] - self._decoded) / decoded
        if self._prompts:
            soonest = min(soonest, max(0.0, self._left) / taken_in)
        return self._at + soonest

    def add(self, ask: Ask, now: float) -> None:
        """One more request; `advance` was called."""
        self._at = now
        self._prompts.append(ask)
        if len(self._prompts) == 1:
            self._left = float(ask.prompt_tokens)

    def happened(self, now: float) -> tuple[list[Ask], list[Ask]]:
        """Those that have got their first token, and those that have ended, by now."""
        self.advance(now)
        first: list[Ask] = []
        ended: list[Ask] = []
        while self._prompts and self._left <= 1e-6:
            ask = self._prompts.popleft()
            self._left = float(self._prompts[0].prompt_tokens) if self._prompts else 0.0
            first.append(ask)
            if ask.tokens <= 1:
                ended.append(ask)
            else:
                self._serial += 1
                heapq.heappush(self._decoding, (self._decoded + ask.tokens - 1, self._serial, ask))
        while self._decoding and self._decoding[0][0] <= self._decoded + 1e-9:
            ended.append(heapq.heappop(self._decoding)[2])
        return first, ended

    def leave(self, ask: Ask, now: float) -> None:
        """A request whose client has gone; it must be here."""
        self.advance(now)
        if ask in self._prompts:
            first = self._prompts[0] is ask
            self._prompts.remove(ask)
            if first:
                self._left = float(self._prompts[0].prompt_tokens) if self._prompts else 0.0
            return
        self._decoding.remove(next(entry for entry in self._decoding if entry[2] is ask))
        heapq.heapify(self._decoding)

    def clear(self, now: float) -> list[Ask]:
        """All of them are lost; those that were here."""
        self.advance(now)
        lost = [*self._prompts, *(entry[2] for entry in self._decoding)]
        self._prompts.clear()
        self._decoding.clear()
        self._still = False
        return lost

    def stand_still(self, now: float, *, still: bool) -> None:
        """Pause, or go on."""
        self.advance(now)
        self._still = still

    def beside(self, others: int, now: float) -> None:
        """It has the GPU together with so many others that work."""
        self.advance(now)
        self._share = 1.0 / (1 + others) if self._speed.shares else 1.0

    @property
    def works(self) -> bool:
        """Whether it has something to do, and does it."""
        return not self._still and bool(self._decoding or self._prompts)

    def __len__(self) -> int:
        return len(self._decoding) + len(self._prompts)
