"""What runs inside vLLM: in its workers (`--worker-extension-cls`) and in its API server (`--middleware`).

It runs in the engine's Python, alone: nothing of warmpool's is imported, and vLLM, torch and NumPy only where they are
loaded already. Its code is frozen in every checkpoint, so its digest is part of an image's identity.
"""

from .frontend import Frontend
from .pauses import Pauses
from .randomness import Randomness

__all__ = ["Frontend", "Worker"]


class Worker(Randomness, Pauses):
    """Mixed into vLLM's worker, so every name begins with the project's."""
