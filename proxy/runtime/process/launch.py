"""Runs in the engine's own process just before the engine: what has to be set up there, then exec.

Usage: ``python -I launch.py CWD PROGRAM ARGUMENT...``; standard library only, imports nothing of this project.

uvloop, and so vLLM's API server, opens an io_uring, which CRIU cannot dump, and no setting of libuv's turns that off
(UV_USE_IO_URING=0 does not). A seccomp filter that answers ENOSYS makes it use epoll; CRIU restores the filter.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ERRNO = 0x00050000  # linux/seccomp.h
SECCOMP_RET_ALLOW = 0x7FFF0000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
IO_URING_FIRST, IO_URING_LAST = 425, 427  # io_uring_setup, _enter, _register on both

BPF_LD_W_ABS, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_RET = 0x20, 0x15, 0x35, 0x25, 0x06  # linux/bpf_common.h
OFFSET_NR, OFFSET_ARCH = 0, 4  # struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def forbid_io_uring() -> None:
    """Make io_uring's system calls answer ENOSYS in this process and all that descend from it.

    Raises OSError when the kernel refuses the filter. Does nothing on architectures without a known number.
    """
    arch = AUDIT_ARCH.get(platform.machine())
    if arch is None:
        return
    instructions = [
        (BPF_LD_W_ABS, 0, 0, OFFSET_ARCH),
        (BPF_JEQ, 0, 4, arch),
        (BPF_LD_W_ABS, 0, 0, OFFSET_NR),
        (BPF_JGE, 0, 2, IO_URING_FIRST),
        (BPF_JGT, 1, 0, IO_URING_LAST),
        (BPF_RET, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS),
        (BPF_RET, 0, 0, SECCOMP_RET_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
    program = _Program(len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({arguments[0]}): {os.strerror(number)}")


def main() -> None:
    """Prepare this process and become the engine; exit status 127 when it cannot be started."""
    directory, program, *arguments = sys.argv[1:]
    # What warmpool itself inherited (a shell's pipe, a socket of systemd's) would fail the dump of the engine.
    os.closerange(3, 1 << 30)
    try:
        os.chdir(directory)
        forbid_io_uring()
        os.execvp(program, [program, *arguments])  # noqa: S606 - becoming the engine is the point
    except OSError as error:
        sys.stderr.write(f"warmpool: cannot start {program}: {error}\n")
        raise SystemExit(127) from None


if __name__ == "__main__":
    main()
