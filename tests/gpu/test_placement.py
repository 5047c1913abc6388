"""Which GPU an image goes to."""

from __future__ import annotations

import pytest

from proxy.gpu.nvml import GpuMemory
from proxy.gpu.placement import ImageGpu, PlacementError, pairs, roomy

GIB = 1 << 30


def gpu(uuid: str, name: str = "H200", total: int = 80 * GIB) -> GpuMemory:
    return GpuMemory(0, name, uuid, total, 0)


def of_image(uuid: str, name: str = "H200", total: int = 80 * GIB, *, used: bool = True) -> ImageGpu:
    return ImageGpu(uuid, name, total, used)


HERE = [gpu("a"), gpu("b"), gpu("c", "L4", 24 * GIB)]
IMAGE = [of_image("a"), of_image("b", used=False), of_image("c", "L4", 24 * GIB, used=False)]


def test_where_nothing_moves_the_driver_is_told_nothing() -> None:
    assert pairs(IMAGE, {}, HERE) == {}
    assert pairs(IMAGE, {"a": "a"}, HERE) == {}
    assert pairs([], {"a": "b"}, HERE) == {}


def test_every_gpu_of_the_image_is_named_once() -> None:
    assert pairs(IMAGE, {"a": "b"}, HERE) == {"a": "b", "b": "a", "c": "c"}


def test_an_image_of_another_host_goes_to_gpus_of_the_same_kind() -> None:
    image = [of_image("x", used=False), of_image("y")]
    assert pairs(image, {}, [gpu("a")]) == {"y": "a"}, "what it did not use needs no place"
    assert pairs(image, {}, HERE) == {"x": "b", "y": "a"}
    with pytest.raises(PlacementError, match="made on H200"):
        pairs(image, {}, [gpu("c", "L4")])
    with pytest.raises(PlacementError, match="made on H200"):
        pairs([of_image("x"), of_image("y")], {}, [gpu("a")])


@pytest.mark.parametrize("wanted", [{"a": "c"}, {"a": "nowhere"}, {"a": "b", "b": "b"}])
def test_a_place_that_does_not_fit_is_refused(wanted: dict[str, str]) -> None:
    with pytest.raises(PlacementError, match="cannot go"):
        pairs(IMAGE, wanted, HERE)


def test_it_stays_where_there_is_room_and_goes_where_there_is_most() -> None:
    here = [gpu("a"), gpu("b"), gpu("d"), gpu("c", "L4")]
    assert roomy({"a": 10}, here, {"a": 10, "b": 50, "d": 60}) == {}
    assert roomy({"a": 10}, here, {"a": 9, "b": 50, "d": 60, "c": 99}) == {"a": "d"}
    assert roomy({"a": 10, "b": 10}, here, {"a": 9, "b": 50, "d": 60}) == {"a": "d", "b": "b"}
    assert roomy({"a": 10, "b": 10}, here, {"a": 9, "b": 50, "d": 5}) == {}, "nowhere"
    assert roomy({"unknown": 10}, here, {"a": 50}) == {}
