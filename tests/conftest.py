"""Fixtures for more than one file."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.forked import ENGINES, LOADTESTS, PROXIES
from tests.front import Front, fronts_of_test
from tests.support import examples

if TYPE_CHECKING:
    from collections.abc import Iterator


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As of a job in the background. What is started from here would ignore it too, and some tests interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Commands without a configuration use none, whatever is installed on this machine.
os.environ["WARMPOOL_CONFIG"] = ""

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("warmpool", deadline=None, max_examples=examples(50))
hypothesis.settings.load_profile("warmpool")


@pytest.fixture(scope="session", autouse=True)
def _forks() -> Iterator[None]:
    """The processes that programs are forked from end with the tests."""
    yield
    for forks in (ENGINES, PROXIES, LOADTESTS):
        forks.close()


front_of = pytest.fixture(fronts_of_test)


@pytest.fixture
async def front(front_of: Any) -> Front:
    """One that no test configures."""
    made: Front = await front_of()
    return made
