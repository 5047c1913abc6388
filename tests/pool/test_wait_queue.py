"""Those who wait, in order."""

from __future__ import annotations

from proxy.pool.wait_queue import WaitQueue


def test_the_lowest_rank_is_next_and_of_equal_ones_who_came_first() -> None:
    queue, counts = WaitQueue[str](), list[int]()
    queue.on_count = counts.append
    for member, rank in (("late", 3.0), ("b", 1.0), ("c", 1.0), ("a", -5.0)):
        queue.add(member, rank)
    assert [*queue] == ["a", "b", "c", "late"]
    assert queue.first() == "a"
    queue.discard("b")
    queue.discard("b")
    queue.discard("nobody")
    assert ([*queue], len(queue), "b" in queue, "c" in queue) == (["a", "c", "late"], 3, False, True)
    queue.clear()
    assert (queue.first(), len(queue), sum(counts)) == (None, 0, 0)
