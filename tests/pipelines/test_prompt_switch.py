"""A prompt switch reaches both models at once: the code step behind it, and the first segment of the new shot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arlon.diffusion.denoiser import Denoiser, GuidedPrompt
from arlon.film.messages import Job, TextRequest
from arlon.film.schedule import film_requests
from arlon.film.storyboard import StoryboardError, parse_storyboard
from arlon.film.workers import RefineWorker, TextWorker
from arlon.models.ar import CodeTransformer
from pipelines.executors.local import run_local
from pipelines.runs.edit import begin_change, change_run, with_shot_changed
from pipelines.runs.generate import FilmProgress, FilmResult, generate
from pipelines.runs.resume import continue_run, open_run
from pipelines.runs.verify import replay_segment
from pipelines.store.run_folder import RunFolder
from tests.pipelines.films import prepared_film

FIRST, SECOND = "a red circle", "a blue square"
SWITCH = 8
"""First code frame of the second shot: the first one's 15 latent frames are covered by code frames 0 to 7."""


class Seen:
    """What the two models were conditioned on, while a film of two shots was made."""

    def __init__(self, model: Path, folder: Path, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
        shots = ({"prompt": FIRST, "duration": "51f"}, {"prompt": second, "duration": "34f"})
        prepared = prepared_film(model, folder / "a.mp4", *shots)
        self.job: Job = prepared.job
        self.reads: list[tuple[int, Tensor, Tensor]] = []
        """Of each time the code model read its context anew: codes in it, the text, the logits that came out."""
        self.texts: list[Tensor] = []
        """Of each segment, the text the diffusion transformer got."""
        prefill, make = CodeTransformer.prefill, Denoiser.__init__

        def seen_prefill(model: CodeTransformer, codes: Tensor, text: Tensor, *rest: Any, **options: Any) -> Any:
            logits, cache = prefill(model, codes, text, *rest, **options)
            self.reads.append((codes.shape[1], text[0].clone(), logits[0].clone()))
            return logits, cache

        def seen_denoiser(denoiser: Denoiser, backbone: Any, prompt: GuidedPrompt, **options: Any) -> None:
            self.texts.append(prompt.text.tokens.clone())
            make(denoiser, backbone, prompt, **options)

        with monkeypatch.context() as patch:
            patch.setattr(CodeTransformer, "prefill", seen_prefill)
            patch.setattr(Denoiser, "__init__", seen_denoiser)
            folder.mkdir(parents=True)
            RunFolder(prepared.paths.run_dir).start({})
            for _ in run_local(self.job, prepared.output):
                pass
        self.codes = RunFolder(prepared.paths.run_dir).read_codes()[0]


@pytest.mark.slow
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


def blended_job(model: Path, output: Path, **shot: Any) -> Job:
    shots = ({"prompt": FIRST, "duration": "51f"}, {"prompt": SECOND, "duration": "68f", **shot})
    return prepared_film(model, output, *shots).job


def test_blended_requests_bring_both_prompts_where_both_count(tiny_model: Path, tmp_path: Path) -> None:
    """Code frame 8 is the first of the new shot, latent frame 15 too: half of code frame 7, which is not its own."""
    first, second, third = film_requests(blended_job(tiny_model, tmp_path / "a.mp4", blend=2))
    assert first.refine.blend is None
    assert first.code.prompts == (FIRST, SECOND)  # the halo of the VQ-VAE decoder reaches into the blended frames
    assert second.code.prompts == ((FIRST, SECOND) if second.code.start < SWITCH + 2 else (SECOND,))
    assert third.code.prompts == (SECOND,)
    blend = second.refine.blend
    assert blend is not None
    assert blend.prompt == FIRST
    # New latent frames 15 to 24, two a code frame from 16 on.
    assert blend.weights[5:] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1, 1])
    assert second.refine.prompts == (SECOND, FIRST)
    assert second.write.inputs.to_plain()["blend"] == {"prompt": FIRST, "weights": list(blend.weights)}
    assert third.refine.blend is None
    assert "blend" not in first.write.inputs.to_plain() | third.write.inputs.to_plain()


def test_velocity_of_a_blended_segment_lies_between_that_of_both_prompts(tiny_model: Path, tmp_path: Path) -> None:
    """The velocity of every latent frame lies between that of the two prompts, as far as its code frame says."""
    job = blended_job(tiny_model, tmp_path / "a.mp4", blend=2)
    request = list(film_requests(job))[1].refine
    worker, features = RefineWorker(job), TextWorker(job).run(TextRequest(prompts=(FIRST, SECOND)))
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 15, 4, 6, generator=generator)
    codes = torch.randint(0, 32, (1, request.segment.num_code_frames, 2, 3), generator=generator)
    mask, t = torch.ones(1, 15, dtype=torch.bool), torch.full((1,), 0.7)
    with torch.inference_mode():
        between, old, new = (
            worker.denoiser(replace(request, text=features, prompt=prompt, blend=blend), codes)(latent, t, mask)
            for prompt, blend in ((SECOND, request.blend), (FIRST, None), (SECOND, None))
        )
    assert not old.equal(new)
    for frame, share in enumerate(request.blend.weights):
        expected = (1 - share) * old[:, :, frame] + share * new[:, :, frame]
        torch.testing.assert_close(between[:, :, frame], expected)


@pytest.mark.slow
def test_blended_films_are_made_again_exactly_and_redone_where_the_old_prompt_counts(
    tiny_model: Path, tmp_path: Path
) -> None:
    shots = ({"prompt": FIRST, "duration": "51f"}, {"prompt": SECOND, "duration": "68f", "blend": 2})
    whole = generate(prepared_film(tiny_model, tmp_path / "whole.mp4", *shots))
    plain = generate(prepared_film(tiny_model, tmp_path / "plain.mp4", shots[0], {**shots[1], "blend": 0}))
    codes, plain_codes = (RunFolder(film.run_dir).read_codes()[0] for film in (whole, plain))
    assert codes[:, :SWITCH].equal(plain_codes[:, :SWITCH])
    assert not codes.equal(plain_codes)
    assert list(replay_segment(open_run(whole.run_dir), 1)) == []

    def redone(storyboard: Any) -> FilmResult:
        old = open_run(plain.run_dir)
        new = change_run(old, storyboard)
        return generate(new.prepared, begin=lambda _, executor: begin_change(old, new, executor))

    board = open_run(plain.run_dir).plan.storyboard
    again = redone(replace(board, shots=(board.shots[0], replace(board.shots[1], blend=2))))
    assert again.film.read_bytes() == whole.film.read_bytes()
    other = "a green circle"
    changed = redone(with_shot_changed(open_run(plain.run_dir), 1, prompt=other))
    fresh = generate(prepared_film(tiny_model, tmp_path / "fresh.mp4", {**shots[0], "prompt": other}, shots[1]))
    assert changed.film.read_bytes() == fresh.film.read_bytes()
    inputs = RunFolder(changed.run_dir).read_segment(1).inputs
    assert inputs["blend"]["prompt"] == other


@pytest.mark.slow
def test_an_interrupted_blend_goes_on_to_the_same_film(tiny_model: Path, tmp_path: Path) -> None:
    shots = ({"prompt": FIRST, "duration": "51f"}, {"prompt": SECOND, "duration": "68f", "blend": 5})
    whole = generate(prepared_film(tiny_model, tmp_path / "whole.mp4", *shots))

    def stop(_: FilmProgress) -> None:
        raise KeyboardInterrupt

    prepared = prepared_film(tiny_model, tmp_path / "again.mp4", *shots)
    with pytest.raises(KeyboardInterrupt):
        generate(prepared, on_progress=stop)
    run = open_run(prepared.paths.run_dir)
    again = generate(run.prepared, begin=lambda *_: continue_run(run))
    assert again.num_made == 2
    assert again.film.read_bytes() == whole.film.read_bytes()


def test_a_blend_behind_a_cut_is_refused() -> None:
    shots = [{"prompt": FIRST}, {"prompt": SECOND, "transition": "cut", "blend": 2}]
    with pytest.raises(StoryboardError, match=r"shots\[1\].blend needs transition 'continue'"):
        parse_storyboard({"shots": shots})
    with pytest.raises(StoryboardError, match="must be between 0 and 64, got 65"):
        parse_storyboard({"shots": [{"prompt": FIRST, "blend": 65}]})
