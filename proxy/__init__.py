"""warmpool: an OpenAI-compatible reverse proxy in front of vLLM engines that are mostly not running."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("warmpool-proxy")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
