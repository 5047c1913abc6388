"""Values as people write them: durations, sizes, addresses. Usable without the settings, and without pydantic."""

from __future__ import annotations

import functools
import ipaddress
import re

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[ ]?(?:ms|s|m|h|d)[ ]*)+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)[ ]?(ms|s|m|h|d)")
_NEVER = frozenset({"never", "off"})
_TIMES_OF_DAY = re.compile(r"(\d\d):([0-5]\d) ?- ?(\d\d):([0-5]\d)")
_DAY_MIN = 24 * 60
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SIZE_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgtpe", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_LEAST_BARE_BYTES = 1 << 20


def parse_duration(value: object) -> float:
    """Seconds of a duration such as ``"90s"``, ``"1m30s"``, ``"250ms"`` or ``"30 s"``.

    Raises ValueError for anything else; a bare number too, since its unit would be a guess.
    """
    if isinstance(value, str) and _DURATION.fullmatch(value.strip()):
        return sum(float(n) * _UNITS_S[unit] for n, unit in _DURATION_PART.findall(value))
    raise ValueError('a duration needs a unit: "500ms", "90s", "1m30s", "2h" or "1d"')


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back as `seconds` (to the millisecond)."""
    left_ms = round(seconds * 1000)
    parts = []
    for unit, size_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left_ms = divmod(left_ms, size_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_optional_duration(value: object) -> float | None:
    """As `parse_duration`; None for "never", "off" and None."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NEVER):
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "never"') from None


def format_optional_duration(seconds: float | None) -> str:
    """The shortest text that `parse_optional_duration` reads back."""
    return "never" if seconds is None else format_duration(seconds)


def checked_times_of_day(value: str) -> str:
    """Times such as ``"22:00-06:30"``. Raises ValueError for anything else, and for none at all."""
    first, last = _minutes(value)
    if first == last:
        raise ValueError(f"{value!r} is no time at all: the whole day is 00:00-24:00")
    return value


def lies_in(times: str, minute: int) -> bool:
    """Whether a minute of the day is one of these; times may go over midnight."""
    first, last = _minutes(times)
    return first <= minute < last if first < last else minute >= first or minute < last


def _minutes(times: str) -> tuple[int, int]:
    match = _TIMES_OF_DAY.fullmatch(times.strip())
    if match is None:
        raise ValueError('times of the day are from one to another: "22:00-06:30"')
    first, last = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
    if first >= _DAY_MIN or last > _DAY_MIN:
        raise ValueError(f"{times!r}: a day ends at 24:00")
    return first, last


def parse_size(value: object) -> int:
    """Bytes of a size such as ``"16GiB"``, ``"1.5 GB"`` or ``4096``. Raises ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        factor = _SIZE_UNITS.get(match[2].lower())
        if factor is not None:
            return int(match[1]) * factor if match[1].isdecimal() else int(float(match[1]) * factor)
    raise ValueError('a size is a number with a unit, "512MiB" or "16GiB"; without one it is bytes')


def parse_memory(value: object) -> int:
    """As `parse_size`, for an amount of memory: a small number without a unit is a unit forgotten."""
    count = parse_size(value)
    bare = str(value).strip()
    if 0 < count < _LEAST_BARE_BYTES and bare.isdecimal():
        raise ValueError(f'{bare} has no unit, and would be bytes: write "{bare}GiB" or "{bare}MiB"')
    return count


def format_size(count: int) -> str:
    """A size in the largest binary unit that divides it: ``"16GiB"``, ``"1536KiB"``, ``"100B"``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count}B"


def short_size(count: int) -> str:
    """A size for people, to three digits: ``"4.05 GiB"``, ``"812 MiB"``, ``"0 B"``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether only processes of this host reach an address; names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
