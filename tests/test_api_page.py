"""docs/api.md says what the sources say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import arlon

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `([\w.]+)`$", PAGE, re.MULTILINE)


def test_the_page_is_what_the_script_writes() -> None:
    command = [sys.executable, ROOT / "docs" / "make_api.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_public_name_of_arlon_is_on_the_page() -> None:
    assert {f"arlon.{name}" for name in arlon.__all__} <= set(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_name_on_the_page_can_be_imported_from_there(heading: str) -> None:
    module, _, name = heading.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_links_of_the_contents_lead_to_headings() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", text.lower()) for text in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert links
    assert set(links) <= anchors


def test_arguments_are_written_as_in_the_sources() -> None:
    assert 'solver: str | Solver = "euler",' in PAGE
    assert "ArlonPipeline.from_pretrained" in PAGE
    assert "- `velocity_fn`: " in PAGE
