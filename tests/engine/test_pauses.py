"""A worker off its GPU and back: the extension itself, on memory that stands in for the GPU's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.engine.test_weights_copy import worker

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from loadtest.engine_weights import Worker

__all__ = ["worker"]

CACHE_BYTES = 64 << 10


def test_the_kv_cache_comes_back_and_then_the_weights(worker: Worker) -> None:
    worker.call("warmpool_save_weights")
    saved = worker.call("warmpool_pause")
    assert saved["bytes"] == saved["held"] == CACHE_BYTES
    assert not worker.valid(), "the weights' memory was given back"
    assert not worker.cache_valid(), "the KV cache's too"
    assert worker.call("warmpool_unpause")["bytes"] == CACHE_BYTES
    assert worker.cache_valid()
    assert "error" not in worker.call("warmpool_load_weights")
    assert worker.valid()


def test_without_a_copy_of_the_weights_nothing_is_given_back(worker: Worker) -> None:
    assert worker.call("warmpool_can_pause") == {"copy": False}
    assert "error" in worker.call("warmpool_pause")
    assert worker.valid()
    assert worker.cache_valid()
    assert worker.call("warmpool_unpause")["bytes"] == 0
    worker.call("warmpool_save_weights")
    assert worker.call("warmpool_can_pause") == {"copy": True}


def test_a_copy_that_was_removed_meanwhile_prevents_a_pause(worker: Worker, tmp_path: Path) -> None:
    worker.call("warmpool_save_weights")
    next(tmp_path.glob("*.weights")).unlink()
    assert worker.call("warmpool_can_pause") == {"copy": False}
    assert "error" in worker.call("warmpool_pause")
    assert worker.cache_valid()


def test_both_ways_can_be_asked_for_again(worker: Worker) -> None:
    """Who asks may not know what the one before had done."""
    worker.call("warmpool_save_weights")
    assert worker.call("warmpool_pause")["bytes"] == worker.call("warmpool_pause")["bytes"] == CACHE_BYTES
    worker.call("warmpool_unpause")
    assert worker.call("warmpool_unpause")["bytes"] == 0
    assert worker.cache_valid()


def test_no_room_on_the_gpu_is_no_end(worker: Worker) -> None:
    worker.call("warmpool_save_weights")
    worker.call("warmpool_pause")
    allocator = sys.modules["vllm.device_allocator.cumem"].CuMemAllocator.get_instance()
    take_back, allocator.wake_up = allocator.wake_up, refuse
    answer = worker.call("warmpool_unpause")
    assert answer["again"]
    assert "out of memory" in answer["error"]
    allocator.wake_up = take_back
    assert worker.call("warmpool_unpause")["bytes"] == CACHE_BYTES
    assert worker.cache_valid()


def refuse(*_: object) -> None:
    raise RuntimeError("CUDA error: out of memory")


def test_a_failing_copy_is_an_error_and_nothing_is_given_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.call("warmpool_save_weights")
    with monkeypatch.context() as broken:
        broken.setattr(sys.modules["vllm.device_allocator.cumem"].libcudart, "cudaMemcpy", refuse)
        assert "out of memory" in worker.call("warmpool_pause")["error"]
    assert worker.valid()
    assert worker.cache_valid()


def test_what_the_host_has_no_memory_for_is_not_paused(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["proxy.engine.vllm_extension.warmpool_vllm.pauses"], "_free_bytes", lambda: 64 << 10
    )
    worker.call("warmpool_save_weights")
    assert "host memory are free" in worker.call("warmpool_pause")["error"]
    assert worker.valid()
    assert worker.cache_valid()


def test_the_room_in_host_memory_is_kept_for_the_next_pause(worker: Worker) -> None:
    worker.call("warmpool_save_weights")
    for _ in range(100):
        worker.call("warmpool_pause")
        worker.call("warmpool_unpause")
        worker.call("warmpool_load_weights")
    assert worker.valid()
    assert worker.cache_valid()
    assert worker.call("warmpool_end_pauses")["bytes"] == CACHE_BYTES
    assert worker.call("warmpool_end_pauses")["bytes"] == 0


def test_what_is_kept_while_it_is_paused_stays(worker: Worker) -> None:
    worker.call("warmpool_save_weights")
    worker.call("warmpool_pause")
    assert worker.call("warmpool_end_pauses")["bytes"] == 0
    worker.call("warmpool_unpause")
    assert worker.cache_valid()


def test_parts_of_zeros_are_not_copied_and_are_zeros_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU tells which parts have anything in them; here the test does, for parts of 16 KiB."""
    pauses = sys.modules["proxy.engine.vllm_extension.warmpool_vllm.pauses"]
    monkeypatch.setattr(pauses, "_PART_BYTES", 16 << 10)
    monkeypatch.setattr(pauses, "_in_use", lambda *_: [True, False, False, True])
    (cache,) = worker._cache()
    content = cache.buffer.raw
    worker.call("warmpool_save_weights")
    saved = worker.call("warmpool_pause")
    assert (saved["bytes"], saved["held"]) == (32 << 10, CACHE_BYTES)
    worker.call("warmpool_unpause")
    assert cache.buffer.raw == content[: 16 << 10] + bytes(32 << 10) + content[48 << 10 :]
