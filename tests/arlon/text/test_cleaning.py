import json
import re
from pathlib import Path

import pytest

from arlon.text.cleaning import clean_caption

DATA = Path(__file__).parents[2] / "data"
CASES = json.loads((DATA / "text_preprocessing.json").read_text(encoding="utf-8"))
MIXED = json.loads((DATA / "caption_cleaning.json").read_text(encoding="utf-8"))
"""Random rows of awkward pieces, and what the released routine makes of them."""


@pytest.mark.parametrize("case", CASES, ids=[case["text"][:24] or "empty" for case in CASES])
def test_cleaning_equals_the_released_routine(case: dict[str, str]) -> None:
    assert clean_caption(case["text"]) == case["out"]


def test_cleaning_equals_the_released_routine_on_awkward_rows() -> None:
    assert [clean_caption(case["text"]) for case in MIXED] == [case["out"] for case in MIXED]


def test_plain_prompts_are_left_alone() -> None:
    prompt = "a small red square moves left on a grey background"
    assert clean_caption(prompt) == prompt


def test_format_names_inside_words_survive_where_the_released_routine_cuts_them() -> None:
    text, released = "the epsilon of pdfish jpegs", "the ilon of ish s"
    assert re.sub(r"\b(eps|pdf|jpe?g)", "", text) == released
    assert clean_caption(text) == text
