"""A process that outlives warmpool by a moment: when warmpool is gone, however it went, it kills the engines left.

Usage: ``python -m proxy.runtime.guard MARK``, with standard input a pipe whose other end only warmpool holds.
"""

import os
import signal
import sys
import time

from proxy.runtime import processes


def main() -> None:
    """Wait for the end of standard input, then kill every process with the mark until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    while pids := processes.marked(sys.argv[1]):
        processes.send(pids, signal.SIGKILL)
        time.sleep(0.05)  # they are not our children: nothing to wait on


if __name__ == "__main__":
    main()
