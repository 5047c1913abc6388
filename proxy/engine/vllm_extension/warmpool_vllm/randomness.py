"""Fresh randomness for a process that came back from a checkpoint, where all its generators are as they were."""

from __future__ import annotations

import hashlib
import random
import ssl
import sys
from typing import Any


class Randomness:
    """The part of the worker extension that is about randomness; methods return what JSON can hold."""

    def warmpool_reseed(self, entropy: str) -> dict[str, Any]:
        """Begin the worker's generators anew: the names of their libraries, or `error`.

        Workers of tensor parallelism sample side by side and must draw the same numbers, so all are told the same;
        engines of data parallelism must not.
        """
        try:
            return {"reseeded": reseed(f"{entropy} {_engine_number(self)}")}
        except Exception as error:  # noqa: BLE001 - an exception would end the engine in some versions of vLLM
            return {"error": f"{type(error).__name__}: {error}"}


def reseed(entropy: str) -> list[str]:
    """Begin the generators that all code of this process shares anew; the names of their libraries."""
    seed = hashlib.sha512(entropy.encode()).digest()
    random.seed(seed)
    ssl.RAND_add(seed, 0.0)
    done = ["random", "ssl"]
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed([int.from_bytes(seed[i : i + 4], "little") for i in range(0, 64, 4)])
        done.append("numpy")
    if (torch := sys.modules.get("torch")) is not None:
        # The CPU's, and those of all devices.
        torch.manual_seed(int.from_bytes(seed[:8], "little"))
        done.append("torch")
    return done


def _engine_number(worker: object) -> int:
    """Which of several engines with data parallelism this worker belongs to."""
    parallel = getattr(getattr(worker, "vllm_config", None), "parallel_config", None)
    rank = getattr(parallel, "data_parallel_rank", 0)
    return int(getattr(parallel, "data_parallel_index", rank) or 0)
