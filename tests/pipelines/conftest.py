"""One tiny model for all pipeline tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model; see `tests/pipelines/tiny_model.py`."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
