"""A process that outlives warmpool by a moment: when warmpool is gone, however it went, it kills the engines left.

Usage: ``python -m proxy.runtime.process.end_orphans MARK``, with standard input a pipe whose other end only warmpool
holds. Engines are found by their mark, and by the sessions that warmpool names on that pipe (``+PID`` and ``-PID``, a
line each): an engine may have overwritten its environment, as vLLM's do.
"""

import os
import signal
import sys
import time

from proxy.host import processes


def main() -> None:
    """Wait for the end of standard input, then kill every process with the mark or of a session until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sessions: set[int] = set()
    said = b""
    while chunk := os.read(0, 4096):
        *lines, said = (said + chunk).split(b"\n")
        for line in lines:
            (sessions.add if line.startswith(b"+") else sessions.discard)(int(line[1:]))
    while pids := processes.alive_among(sys.argv[1], sessions):
        processes.send(pids, signal.SIGKILL)
        time.sleep(0.05)  # they are not our children: nothing to wait on


if __name__ == "__main__":
    main()
