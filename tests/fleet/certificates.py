"""A small authority, and certificates of hosts, made with openssl as docs/fleet.md says."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def authority(folder: Path) -> Path:
    """Its certificate, in a folder of its own."""
    folder.mkdir()
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=fleet", "-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key",
        "-out", "ca.pem", folder=folder,
    )  # fmt: skip
    return folder / "ca.pem"


def certificate(folder: Path, host: str, *, name: str | None = None) -> tuple[Path, Path]:
    """A host's certificate, with the authority of this folder, and its key; `name`: the alternative name it has."""
    names = folder / f"{host}.ext"
    names.write_text(f"subjectAltName={name or f'DNS:{host}'}\n")
    _openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={host}",
        "-keyout", f"{host}.key", "-out", f"{host}.csr", folder=folder,
    )  # fmt: skip
    _openssl(
        "x509", "-req", "-in", f"{host}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", names.name, "-out", f"{host}.pem", folder=folder,
    )  # fmt: skip
    (folder / f"{host}.key").chmod(0o600)
    return folder / f"{host}.pem", folder / f"{host}.key"


def _openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
