"""Property tests draw the same examples in every run: what fails in CI fails here."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same examples", derandomize=True, max_examples=60, deadline=None, database=None)
settings.load_profile("same examples")
