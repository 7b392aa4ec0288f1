"""What tests with PyTorch need, and what happens where it is missing."""

from __future__ import annotations

import os

import pytest

import reap
from reap.engine import native
from reap.errors import NativeModuleMissing


def absent(reason: str) -> None:
    """What may be missing on a laptop must not be missing in CI."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def needs() -> None:
    for module in ("torch", "transformers"):
        try:
            __import__(module)
        except ImportError:
            absent(f"{module} is not installed: pip install 'reap-moe[hf]'")
    try:
        native.load()
    except NativeModuleMissing as error:
        absent(str(error))
    from reap.hf.disk.convert import find_converter

    try:
        find_converter()
    except reap.ReapError as error:
        absent(str(error))
