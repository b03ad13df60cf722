"""Requests of a film and the record of what a segment is made from, without any model or file."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import torch

from arlon.film.geometry import GenerationDefaults, ModelGeometry
from arlon.film.messages import DecodeRequest, Job, RefineRequest, SegmentInputs, SegmentRequests
from arlon.film.plan import Segment, make_plan, resolve_storyboard
from arlon.film.prompt_schedule import PromptSchedule, ScheduledPrompt
from arlon.film.schedule import film_requests, segment_inputs
from arlon.film.settings import Settings
from arlon.film.storyboard import ResolvedStoryboard, StoryboardError, parse_storyboard
from arlon.film.take_media import TakeMedia
from arlon.grids import SegmentGrid

DEFAULTS = GenerationDefaults(height=32, width=48, fps=8.0, segment=15, overlap=5)
GEOMETRY = ModelGeometry(
    defaults=DEFAULTS,
    grid=SegmentGrid(segment=15, overlap=5),
    space_stride=8,
    patch_size=(1, 2, 2),
    code_ratio=(2, 2, 2),
)

NOT_IN_INPUTS = {
    "RefineRequest.segment": "its fields are listed one by one",
    "RefineRequest.text": "follows from the prompts and the model",
    "RefineRequest.codes": "their hash is added when they exist",
    "RefineRequest.before": "the hash of what is carried over is added when it exists",
    "DecodeRequest.size": "stored as cut_to",
    "DecodeRequest.refined": "follows from all other inputs",
    "DecodeRequest.before": "the hash of what is carried over is added when it exists",
    "Segment.index": "a segment may be used again at another place in the film",
    "Segment.shot": "what a shot says is in the prompts and numbers",
    "Segment.overlap": "the hash of what is carried over is added when it exists",
    "Segment.start_frame": "a segment may be used again at another place in the film",
    "Segment.start_code_frame": "the hash of the codes from there on is added when they exist",
    "Segment.num_code_frames": "the hash of the codes up to there is added when they exist",
    "Segment.ends_take": "decides how many frames are held, which is stored",
    "Segment.ends_shot": "decides whether there is a tail, which is stored",
    "Settings.ar_temperature": "decides the codes, whose hash is added",
    "Settings.ar_top_p": "decides the codes, whose hash is added",
    "Settings.ar_guidance_scale": "decides the codes, whose hash is added",
}
"""Fields that the record of a segment leaves out, and why it may."""


def job(*shots: dict[str, Any], settings: Settings | None = None, **film: Any) -> Job:
    board = parse_storyboard({"seed": 7, "shots": list(shots or [{"prompt": "a", "duration": "85f"}]), **film})
    plan = make_plan(resolve_storyboard(board, DEFAULTS, 1), GEOMETRY)
    return Job(plan=plan, settings=settings or Settings(), model_path="model", model_hash="0123")


@pytest.mark.parametrize("kind", [RefineRequest, DecodeRequest, Segment, Settings])
def test_whatever_decides_a_segment_is_in_its_record_or_left_out_for_a_reason(kind: type) -> None:
    recorded = {field.name for field in fields(SegmentInputs)}
    for field in fields(kind):
        is_left_out = f"{kind.__name__}.{field.name}" in NOT_IN_INPUTS
        assert (field.name in recorded) != is_left_out, f"{kind.__name__}.{field.name}"
    known = {field.name for field in fields(kind)}
    stated = {name.partition(".")[2] for name in NOT_IN_INPUTS if name.partition(".")[0] == kind.__name__}
    assert stated <= known, "a field that is left out for a reason, but does not exist"


def changed_settings() -> list[tuple[str, Any]]:
    changes = {
        "dtype": "bfloat16",
        "num_threads": 2,
        "device": "cuda",
        "crf": 20,
        "preset": "slow",
        "vae_blend_frames": 2,
        "vae_tile": 64,
        "vae_micro_batch": 1,
        "text_dtype": "bfloat16",
        "x264_cpu_independent": False,
    }
    names = {field.name for field in fields(Settings)} & {field.name for field in fields(SegmentInputs)}
    return [(name, changes[name]) for name in sorted(names)]


@pytest.mark.parametrize(("name", "value"), changed_settings())
def test_every_setting_in_the_record_changes_it(name: str, value: Any) -> None:
    before, after = (
        next(film_requests(job(settings=settings))).write.inputs
        for settings in (Settings(), replace(Settings(), **{name: value}))
    )
    assert getattr(after, name) == value
    assert before.to_plain() != after.to_plain()


def test_every_number_of_the_requests_is_where_its_name_says() -> None:
    request = list(film_requests(job(height=30, use_codes=False)))[1]
    refine = replace(
        request.refine,
        head=torch.zeros(1, 4, 1, 4, 6),
        tail=torch.ones(1, 4, 1, 4, 6),
        placed=(torch.zeros(1, 4, 15, 4, 6), torch.ones(1, 15)),
    )
    inputs = segment_inputs(job(), refine, replace(request.decode, lead=2, held=3))
    for kind in (refine, request.segment):
        for field in fields(kind):
            if hasattr(inputs, field.name) and isinstance(getattr(kind, field.name), str | float | int):
                assert getattr(inputs, field.name) == getattr(kind, field.name), field.name
    assert (inputs.lead, inputs.held, inputs.cut_to, inputs.model) == (2, 3, (30, 48), "0123")
    assert inputs.placed is not None
    hashes = {inputs.head, inputs.tail, *inputs.placed}
    assert len(hashes) == 4
    assert all(len(text or "") == 64 for text in hashes)


def test_a_record_leaves_out_what_the_first_version_did_not_know_and_survives_json() -> None:
    optional = {field.name for field in fields(SegmentInputs) if field.default is not MISSING}
    first = job(settings=replace(Settings(), x264_cpu_independent=False))
    plain = next(film_requests(first)).write.inputs.to_plain()
    assert plain.keys() == {field.name for field in fields(SegmentInputs)} - optional
    blended = job({"prompt": "a", "duration": "51f"}, {"prompt": "b", "duration": "34f", "blend": 3}, height=30)
    inputs = [request.write.inputs for request in film_requests(blended)]
    assert json.loads(json.dumps(inputs[1].to_plain())) == inputs[1].to_plain()
    assert inputs[1].to_plain()["blend"]["prompt"] == "a"
    assert inputs[1].to_plain()["cut_to"] == [30, 48]


def test_media_are_given_where_their_shot_and_take_begin_and_end() -> None:
    shots = [
        {"prompt": "a", "duration": "85f", "image": "a.png", "end_image": "a.png"},
        {"prompt": "b", "duration": "68f", "end_image": "b.png"},
        {"prompt": "c", "duration": "51f", "transition": "cut"},
    ]
    head, codes, tails = torch.zeros(1, 4, 1, 4, 6), torch.zeros(1, 1, 2, 3).long(), torch.arange(2).view(2, 1, 1, 1, 1)
    media = {0: TakeMedia(head=head, tail=tails[:1], codes=codes), 1: TakeMedia(tail=tails[1:])}
    made = list(film_requests(job(*shots), media))
    assert [request.segment.shot for request in made] == [0, 0, 1, 1, 2]
    assert [request.refine.head is head for request in made] == [True, False, False, False, False]
    assert [request.refine.head is None for request in made] == [False, True, True, True, True]
    ends = [None if request.refine.tail is None else int(request.refine.tail) for request in made]
    assert ends == [None, 0, None, 1, None]
    assert [request.code.given is codes for request in made] == [True, True, True, True, False]
    with pytest.raises(ValueError, match=r"shots\[1\]\.end_image"):
        next(film_requests(job(*shots), {0: media[0]}))


def test_code_requests_of_a_take_follow_each_other() -> None:
    shots = [{"prompt": "a", "duration": "85f"}, {"prompt": "b", "duration": "51f", "transition": "cut"}]
    made: list[SegmentRequests] = list(film_requests(job(*shots)))
    assert [(request.code.take, request.code.start, request.code.stop) for request in made] == [
        (0, 0, 8),
        (0, 8, 13),
        (1, 0, 8),
    ]


def test_a_schedule_names_the_prompts_that_code_frames_depend_on() -> None:
    spans = [("a", 1, 0, 4), ("b", 2, 2, 5), ("c", 3, 0, 1)]
    schedule = PromptSchedule(
        tuple(ScheduledPrompt(prompt=p, seed=s, blend=b, num_code_frames=n) for p, s, b, n in spans)
    )
    assert [schedule.at(frame).seed for frame in range(10)] == [1] * 4 + [2] * 5 + [3]
    assert schedule.prompts(0, 4) == ("a",)
    assert schedule.prompts(4, 6) == ("a", "b"), "while a prompt is blended in, the one before counts too"
    assert schedule.prompts(6, 9) == ("b",)
    assert schedule.prompts(5, 10) == ("a", "b", "c")
    assert schedule.prompts(3, 3) == ()
    for frame in (-1, 10):
        with pytest.raises(ValueError, match=f"there is no frame {frame}"):
            schedule.at(frame)


def test_a_plan_needs_every_value_that_the_model_would_decide() -> None:
    board = parse_storyboard({"shots": ["a"]})
    resolved = resolve_storyboard(board, DEFAULTS, 1)
    assert parse_storyboard(resolved.to_plain()).to_plain() == resolved.to_plain()
    assert ResolvedStoryboard.of(parse_storyboard(resolved.to_plain())) == resolved
    for name in ("seed", "fps", "height", "width", "guidance_scale", "num_inference_steps", "solver"):
        with pytest.raises(StoryboardError, match=name):
            replace(resolved, **{name: None})
