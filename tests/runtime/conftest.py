"""Fixtures of the runtimes' tests."""

import pytest

from tests.podman_bench import tmpfs_folder
from tests.podman_host import host_of_test

images = pytest.fixture(tmpfs_folder)
host = pytest.fixture(host_of_test)
