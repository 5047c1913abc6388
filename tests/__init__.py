"""Bytecode is written here, whatever the environment says.

pytest rewrites the assertions of every test file and of every plugin, hypothesis among them; without what it writes
into `__pycache__` each worker does that at each start, which takes half of its time to the first test.
"""

import os
import sys

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
