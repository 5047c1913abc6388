"""`python -m loadtest COMMAND`."""

from __future__ import annotations

from loadtest.commands import main

if __name__ == "__main__":
    main()
