"""What can be wrong with the store, and with an image."""

from __future__ import annotations

from proxy.errors import WarmpoolError


class StoreError(WarmpoolError):
    """The store cannot take or give an image; nothing that was there was harmed."""


class DamagedError(StoreError):
    """An image or an archive that is not what was written: a fact about its content, not about the moment."""


class OtherVersionError(StoreError):
    """An image that another version of warmpool wrote."""
