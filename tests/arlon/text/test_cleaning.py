import json
from pathlib import Path

import pytest

from arlon.text.cleaning import clean_caption

DATA = Path(__file__).parents[2] / "data" / "text_preprocessing.json"
CASES = json.loads(DATA.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=[case["text"][:24] or "empty" for case in CASES])
def test_cleaning_equals_the_released_routine(case: dict[str, str]) -> None:
    assert clean_caption(case["text"]) == case["out"]


def test_plain_prompts_are_left_alone() -> None:
    prompt = "a small red square moves left on a grey background"
    assert clean_caption(prompt) == prompt


def test_format_names_inside_words_survive() -> None:
    assert clean_caption("the epsilon of a pdfish thing") == "the epsilon of a pdfish thing"
