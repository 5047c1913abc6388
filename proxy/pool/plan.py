"""What to do now, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.pool.model_view import InstanceView
    from proxy.tiers import Tier


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring an instance (None: a new one) of a model to ready, once the victims have stepped down."""

    model: str
    instance: InstanceView | None
    victims: tuple[StepDown, ...] = ()


@dataclass(frozen=True, slots=True)
class Clone:
    """Prepare a further instance from the model's golden checkpoint."""

    model: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Take an instance to a colder tier."""

    instance: InstanceView
    to: Tier
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Have a busy instance take no new requests, so that it becomes idle."""

    instance: InstanceView
    reason: str = "another model waits for its place"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell those who wait for a model that there is not enough host memory for it."""

    model: str
    needed_bytes: int
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class Readmit:
    """Have a retiring instance take requests again: nobody needs its place any more."""

    instance: InstanceView


@dataclass(frozen=True, slots=True)
class Pause:
    """Have the requests of a busy instance stand still, so that another model can run meanwhile."""

    instance: InstanceView


@dataclass(frozen=True, slots=True)
class Unpause:
    """Have the requests of a paused instance go on; there is room for it."""

    instance: InstanceView


Action = Wake | StepDown | Retire | Readmit | Clone | Refuse | Pause | Unpause


@dataclass(slots=True)
class Plan:
    """What to do now, in this order, and when to decide again if nothing happens before."""

    actions: list[Action] = field(default_factory=list)
    deadline: float | None = None
    starved: bool = field(default=False, compare=False)
    """Somebody waits for whom there is no room yet."""

    def presses(self) -> bool:
        """Whether somebody needs a place that another holds."""
        return self.starved or any(isinstance(action, Wake) and action.victims for action in self.actions)

    def not_later_than(self, when: float) -> None:
        """Ask for another decision at `when`."""
        self.deadline = when if self.deadline is None else min(self.deadline, when)


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    plan: Plan = field(default_factory=Plan)
    used: set[str] = field(default_factory=set)
    """The ids of those that play a part in it."""
    given: dict[str, int] = field(default_factory=dict)
    """The memory, by place, that those get who are woken in it, or wait for what comes free."""

    def give(self, extra: Mapping[str, int]) -> None:
        """Count what somebody gets."""
        for place, count in extra.items():
            self.given[place] = self.given.get(place, 0) + count
