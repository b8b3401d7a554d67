"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The development data that are not part of the repository; tests that need them skip where they are absent."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("DCP_ZOO_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"development data not found at {folder}: set DCP_ZOO_SHARED")
    return folder
