"""The CPU of this host, as far as a checkpoint depends on it.

Programs such as glibc, OpenBLAS and PyTorch look at their start for what the CPU can do, and choose their code by it. A
restored one goes on with that choice, and ends with SIGILL where an instruction is missing, perhaps much later. Its
registers are restored by a signal frame, which loses what the target's is too small for.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

CPUINFO: Final = Path("/proc/cpuinfo")
AUXV: Final = Path("/proc/self/auxv")
_AT_MINSIGSTKSZ: Final = 51
"""Of the auxiliary vector (getauxval(3)): the largest signal frame, which has the registers' state (xsave) in it."""

_NOT_INSTRUCTIONS: Final = frozenset(
    "acc_power aperfmperf arat arch_capabilities arch_perfmon bts constant_tsc cpuid cpuid_fault dtes64 dtherm "
    "epb ept ept_ad est extd_apicid flexpriority flush_l1d hwp hwp_act_window hwp_epp hwp_notify hwp_pkg_req "
    "hypervisor ibpb ibrs ibrs_enhanced ida intel_ppin kaiser mba md_clear monitor nonstop_tsc nopl npt pbe pdcm "
    "pebs pln pti pts rep_good retpoline sdbg ssbd stibp svm tm tm2 tpr_shadow tsc_adjust tsc_deadline_timer "
    "tsc_known_freq tsc_reliable vme vmx vnmi vpid x2apic xtopology xtpr".split()
)
"""Flags about the kernel, the virtual machine or the power supply: the code of no program depends on them."""


class Cpu(BaseModel):
    """What a checkpoint was taken on."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    vendor: Annotated[str, Field(max_length=200)]
    model: Annotated[str, Field(max_length=200)]
    """For people; what it can do is in `flags`."""
    flags: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=2000)]
    frame_bytes: Annotated[int, Field(ge=0, le=1 << 24)]
    """The largest signal frame, 0 where the kernel does not say."""

    def differences(self, here: Cpu) -> list[str]:
        """Why what was taken on this CPU does not run on the one that is here, one line each."""
        found = []
        if self.vendor != here.vendor:
            found.append(f"CPU vendor was {self.vendor}, is {here.vendor or 'missing'} here")
        if lacking := sorted(set(self.flags) - set(here.flags)):
            found.append(f"CPU was {self.model}, is {here.model} here, which lacks {', '.join(lacking)}")
        if self.frame_bytes and here.frame_bytes and self.frame_bytes > here.frame_bytes:
            found.append(f"CPU registers (xsave) took {self.frame_bytes} bytes, have {here.frame_bytes} here")
        return found


@cache
def here() -> Cpu:
    """That of this host."""
    return read(CPUINFO, AUXV)


def read(cpuinfo: Path, auxv: Path) -> Cpu:
    """From these files; of several processors, what all of them have."""
    processors = [
        {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        for block in _text(cpuinfo).split("\n\n")
    ]
    flags: set[str] | None = None
    for processor in processors:
        own = processor.get("flags", processor.get("Features"))
        if own is not None:
            flags = set(own.split()) if flags is None else flags & set(own.split())
    first = processors[0]
    numbers = [first[name] for name in ("cpu family", "model", "stepping", "CPU part", "CPU variant") if name in first]
    return Cpu(
        vendor=first.get("vendor_id", first.get("CPU implementer", ""))[:200],
        model=f"{first.get('model name', 'CPU')} ({'-'.join(numbers)})"[:200],
        flags=sorted((flags or set()) - _NOT_INSTRUCTIONS),
        frame_bytes=_frame_bytes(auxv),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _frame_bytes(auxv: Path) -> int:
    try:
        pairs = struct.iter_unpack("NN", auxv.read_bytes())
    except (OSError, struct.error):
        return 0
    return next((value for kind, value in pairs if kind == _AT_MINSIGSTKSZ and value <= 1 << 24), 0)
