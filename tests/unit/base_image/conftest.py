"""The modules of the base image, loaded by path as the image runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BASE_IMAGE = Path(__file__).parents[3] / "base-image"


def load(name: str) -> Any:
    """Load a file of `base-image/` under its own name, leaving no bytecode in the build context."""
    spec = importlib.util.spec_from_file_location(f"base_image_{name}", BASE_IMAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


@pytest.fixture(scope="session")
def supervisor() -> Any:
    """`base-image/supervisor.py`."""
    return load("supervisor")


@pytest.fixture(scope="session")
def import_check() -> Any:
    """`base-image/import_check.py`."""
    return load("import_check")
