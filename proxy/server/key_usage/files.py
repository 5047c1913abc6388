"""The files of usage, one for each day, in a folder of their own; written beside and renamed."""

from __future__ import annotations

import datetime as dt
import logging
import re
from typing import TYPE_CHECKING, Final

from proxy.host import owned
from proxy.server.key_usage.figures import Day, parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("warmpool.usage")

_MOST_BYTES: Final = 64 << 20
_NAME: Final = re.compile(r"(\d{4}-\d\d-\d\d)\.json")


class UsageFiles:
    """Reads and writes them; to be called in a thread, since a file system may hang."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, date: dt.date) -> Day:
        """What is there of a day, which may be nothing. A file that is damaged is set aside, and counts as none.

        Raises OSError.
        """
        path = self.folder / f"{date.isoformat()}.json"
        try:
            return parse(date, owned.read_plain(path, _MOST_BYTES))
        except FileNotFoundError:
            pass
        except ValueError as error:
            log.error("%s is damaged (%s): set aside, and counting begins anew", path, error)
            self._set_aside(path)
        return Day(date)

    def _set_aside(self, path: Path) -> None:
        try:
            owned.claim(self.folder)
            owned.rename(path, path.with_suffix(".damaged"))
        except OSError as error:
            log.error("%s: %s", path, error.strerror)

    def write(self, date: dt.date, content: bytes) -> bool:
        """Whether what a day has is on disk; why not is logged."""
        path = self.folder / f"{date.isoformat()}.json"
        try:
            owned.claim(self.folder)  # a cleaner may have removed it
            with owned.replacing(path) as file:
                file.write(content)
        except OSError as error:
            log.error("%s: usage is not kept: %s", path, error.strerror)
            return False
        return True

    def dates(self) -> Iterator[dt.date]:
        """The days that there are files of, in no order."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except OSError:
            return
        for name in names:
            if (match := _NAME.fullmatch(name)) is not None:
                try:
                    yield dt.date.fromisoformat(match[1])
                except ValueError:
                    continue

    def forget_before(self, date: dt.date) -> None:
        """Delete those of earlier days."""
        old = [found for found in self.dates() if found < date]
        try:
            if old:
                owned.claim(self.folder)
            for found in old:
                owned.unlink(self.folder / f"{found.isoformat()}.json")
        except OSError as error:
            log.error("%s: %s", self.folder, error.strerror)
