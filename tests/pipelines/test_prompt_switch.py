"""A prompt switch reaches both models at once: the code step behind it, and the first segment of the new shot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arlon.models.ar import CodeTransformer
from pipelines.local import run_local
from pipelines.requests import Job, TextRequest
from pipelines.run_folder import RunFolder
from pipelines.workers import TextWorker, guidance
from tests.pipelines.films import prepared_film

FIRST, SECOND = "a red circle", "a blue square"
SWITCH = 8
"""First code frame of the second shot: the first one's 15 latent frames are covered by code frames 0 to 7."""


class Seen:
    """What the two models were conditioned on, while a film of two shots was made."""

    def __init__(self, model: Path, folder: Path, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
        shots = ({"prompt": FIRST, "duration": "51f"}, {"prompt": second, "duration": "34f"})
        self.job: Job = prepared_film(model, folder / "a.mp4", *shots).job
        self.reads: list[tuple[int, Tensor, Tensor]] = []
        """Of each time the code model read its context anew: codes in it, the text, the logits that came out."""
        self.texts: list[Tensor] = []
        """Of each segment, the text the diffusion transformer got."""
        prefill, guide = CodeTransformer.prefill, guidance.guide

        def seen_prefill(model: CodeTransformer, codes: Tensor, text: Tensor, *rest: Any, **options: Any) -> Any:
            logits, cache = prefill(model, codes, text, *rest, **options)
            self.reads.append((codes.shape[1], text[0].clone(), logits[0].clone()))
            return logits, cache

        def seen_guide(dit: Any, text: Tensor, *rest: Any, **options: Any) -> Any:
            self.texts.append(text.clone())
            return guide(dit, text, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(CodeTransformer, "prefill", seen_prefill)
            patch.setattr(guidance, "guide", seen_guide)
            folder.mkdir(parents=True)
            RunFolder(self.job.run_dir).start({})
            for _ in run_local(self.job):
                pass
        self.codes = RunFolder(self.job.run_dir).read_codes()[0]


def test_a_switch_changes_the_code_step_behind_it_and_the_first_segment_of_the_new_shot(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched = Seen(tiny_model, tmp_path / "switched", SECOND, monkeypatch)
    steady = Seen(tiny_model, tmp_path / "steady", FIRST, monkeypatch)
    features = TextWorker(switched.job).run(TextRequest(prompts=(FIRST, SECOND))).features

    # The code model: the same up to the switch; there it reads what it wrote, under the new prompt.
    assert switched.codes[:, :SWITCH].equal(steady.codes[:, :SWITCH])
    (_, first_text, first_logits), *_, (num_codes, text, logits) = switched.reads
    *_, (steady_num_codes, steady_text, steady_logits) = steady.reads
    length = text.shape[0]
    torch.testing.assert_close(text, features[SECOND].tokens[0, :length], rtol=0, atol=0)
    torch.testing.assert_close(first_text, features[FIRST].tokens[0, : len(first_text)], rtol=0, atol=0)
    assert steady_text.equal(first_text)
    assert num_codes == steady_num_codes > 0
    assert not logits.equal(steady_logits)
    assert first_logits.equal(steady.reads[0][2])

    # The diffusion transformer: the segment before the switch has the old prompt, the one behind it the new one.
    for seen, prompts in ((switched, (FIRST, SECOND)), (steady, (FIRST, FIRST))):
        assert [text.equal(features[prompt].tokens) for text, prompt in zip(seen.texts, prompts, strict=True)] == [
            True
        ] * 2
