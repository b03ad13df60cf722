"""The mask-strategy grammar against figures of the released code, and what a film's own references give."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon.checkpoint import resolve_model
from arlon.diffusion import references
from arlon.diffusion.references import GivenSpan, Placement, parse_mask_strategy, place_references, snap
from arlon.grids import SegmentGrid, num_latent_frames, num_pixel_frames
from arlon.models.video_vae import VideoVAE
from arlon.shapes.world import render_scene, sample_scene
from tests.opensora_loop import carry_over

DATA = Path(__file__).parents[2] / "data"
GOLDEN = json.loads((DATA / "mask_strategy.json").read_text())
HELPERS = json.loads((DATA / "inference_helpers.json").read_text())
GRID = SegmentGrid(segment=15, overlap=5)


def as_list(group: Placement) -> list[float]:
    return [
        group.segment,
        group.reference,
        group.reference_start,
        group.target_start,
        group.length,
        group.edit_ratio,
    ]


@pytest.mark.parametrize("end", [";", "; ", ";;", " ;\n"])
def test_a_separator_at_the_end_adds_no_group(end: str):
    assert parse_mask_strategy(f"0;1,0,-1{end}") == parse_mask_strategy("0;1,0,-1")
    assert parse_mask_strategy(end) == ()


@pytest.mark.parametrize(("text", "groups"), GOLDEN["parse"].items())
def test_grammar_equals_the_released_code(text: str, groups: list[list[float]]):
    assert [as_list(group) for group in parse_mask_strategy(text)] == groups


def test_starts_snap_as_in_the_released_code():
    for case in GOLDEN["find_nearest_point"]:
        assert snap(case["value"], case["point"], case["max_value"]) == case["out"], case


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['mask_strategy']}@{case['loop_i']}")
def test_placing_equals_the_released_code(case: dict):
    tensors, name = load_file(DATA / "mask_strategy.safetensors"), f"c{case['i']}"
    noise = tensors[f"{name}.z_in"].clone()
    latent, ratio = place_references(
        noise,
        [[tensors[f"ref.{i}"] for i in range(3)]],
        [parse_mask_strategy(case["mask_strategy"])],
        segment=case["loop_i"],
        align=case["align"],
    )
    torch.testing.assert_close(latent, tensors[f"{name}.z_out"], rtol=0, atol=0)
    torch.testing.assert_close(ratio, tensors[f"{name}.mask"], rtol=0, atol=0)
    torch.testing.assert_close(ratio[0], torch.tensor(case["mask"]), rtol=0, atol=0)
    torch.testing.assert_close(noise, tensors[f"{name}.z_in"], rtol=0, atol=0)


def test_every_sample_has_references_of_its_own():
    noise, one, two = torch.zeros(2, 1, 4, 1, 1), torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    groups = parse_mask_strategy("0,0,0,-1"), parse_mask_strategy("0,1,0,1,1,0.5;0")
    latent, ratio = place_references(noise, [[one], [one, two]], groups, segment=0)
    assert latent.flatten(1).tolist() == [[0, 0, 0, 1], [1, 2, 0, 0]]
    assert ratio.tolist() == [[1, 1, 1, 0], [0, 0.5, 1, 1]]


@pytest.mark.parametrize("case", HELPERS["append_generated"], ids=lambda case: ";".join(case["mask_after"]))
def test_carrying_over_equals_the_released_code(case: dict):
    clip = torch.zeros(4, 15, 2, 3)
    for before, num_refs, after in zip(case["mask_before"], case["n_refs_before"], case["mask_after"], strict=True):
        groups, clips = carry_over(
            clip,
            parse_mask_strategy(before),
            [torch.ones(4, 1, 2, 3)] * num_refs,
            segment=case["loop_i"],
            overlap=case["condition_frame_length"],
            edit_ratio=case["edit"],
        )
        assert groups == parse_mask_strategy(after)
        assert clips[-1] is clip
    assert len(clips) == case["n_refs_after"][-1]


def test_a_second_sample_starts_afresh_where_the_released_code_keeps_the_first():
    """The released loop appends to the lists it is given; after two samples of two clips they hold both."""
    strategy, clips = "0", [torch.zeros(1, 1, 1, 1)]
    for _ in range(2):
        strategy += f";1,{len(clips)},-5,0,5,0.0"
        clips.append(torch.zeros(1, 15, 1, 1))
    assert strategy == "0;1,1,-5,0,5,0.0;1,2,-5,0,5,0.0"
    assert len(clips) == 3

    groups, given = parse_mask_strategy("0"), (clips[0],)
    for _ in range(2):
        longer, sources = carry_over(clips[1], groups, given, segment=1, overlap=5)
        assert longer == parse_mask_strategy("0;1,1,-5,0,5,0.0")
        assert len(sources) == 2


def test_frames_behind_an_overlap_are_those_of_the_released_code():
    for latents, frames in HELPERS["prompts"]["dframe_to_frame"].items():
        assert num_pixel_frames(int(latents)) == frames


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0,0,0,0,1,0,7",
            r"'0,0,0,0,1,0,7' must be numbers: segment, reference, .* \(expected at most 6 fields, got 7\)",
        ),
        ("0;x", "group 'x' must be numbers"),
        ("0;;0", "group '' must be numbers"),
        ("0,0.5", "group '0,0.5' must be numbers"),
        ("0,0,0,0,0", "length at least 1"),
        ("-1", "segment and reference must be at least 0"),
        ("0,0,0,0,1,1.5", "edit ratio from 0 to 1, got 0, 0, 1 and 1.5"),
        ("0,0,0,0,1,nan", "edit ratio from 0 to 1"),
    ],
)
def test_bad_strategies_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_mask_strategy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1", r"names reference 1, but there are 1 \(counted from 0\)"),
        ("0,0,0,4", "target start 4 of the mask strategy is outside of 4 latent frames: expected -4 to 3"),
        ("0,0,-3", "reference start -3 of the mask strategy is outside of 2 latent frames"),
    ],
)
def test_groups_that_point_nowhere_are_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        place_references(
            torch.zeros(1, 1, 4, 2, 3), [[torch.zeros(1, 2, 2, 3)]], [parse_mask_strategy(text)], segment=0
        )


def test_references_of_another_size_are_refused():
    groups = [parse_mask_strategy("0")]
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(1, 3, 2\)"):
        place_references(torch.zeros(1, 1, 4, 2, 3), [[torch.zeros(1, 1, 3, 2)]], groups, segment=0)
    with pytest.raises(ValueError, match="one entry a sample: expected 2, got 1 and 1"):
        place_references(torch.zeros(2, 1, 4, 2, 3), [[torch.zeros(1, 1, 2, 3)]], groups, segment=0)


class FrameEncoder:
    """Encodes in chunks of 17 on the latent grid; each latent frame holds the number of the last frame it covers."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, video: Tensor) -> Tensor:
        self.lengths.append(video.shape[2])
        last = [
            frame
            for start in range(0, video.shape[2], 17)
            for frame in reversed(range(min(start + 17, video.shape[2]) - 1, start - 1, -4))
        ]
        assert len(last) == num_latent_frames(video.shape[2])
        return video[:, :1, last, ::2, ::2].expand(-1, 4, -1, -1, -1)


def psnr(got: Tensor, expected: Tensor) -> float:
    """Decibels, for values in [-1, 1]."""
    return float(10 * torch.log10(4 / (got - expected).square().mean()))


def numbered(num_frames: int) -> Tensor:
    return torch.arange(num_frames).float().view(1, -1, 1, 1).expand(3, -1, 4, 6)


@pytest.mark.parametrize(
    ("num_frames", "overlap", "expected"),
    [
        (40, 5, (17, 5)),
        (17, 5, (17, 5)),
        (16, 5, (13, 4)),
        (9, 5, (9, 3)),
        (1, 5, (1, 1)),
        (3, 5, (1, 1)),
        (100, 10, (34, 10)),
        (33, 10, (30, 9)),
        (20, 10, (18, 6)),
    ],
)
def test_given_span_fills_latent_frames_up_to_the_last_frame(num_frames: int, overlap: int, expected: tuple[int, int]):
    grid, encoder = SegmentGrid(segment=20, overlap=overlap), FrameEncoder()
    span = references.given_span(num_frames, grid)
    assert (span.frames, span.latents) == expected
    latent = references.encode_continued(encoder, numbered(num_frames), grid)
    assert latent.shape == (1, 4, span.latents, 2, 3)
    # Each latent frame ends where the one at its place in a take ends: 0, 4, 8, 12, 16 in every chunk of 17.
    ends = [num_frames - span.frames + 17 * (j // 5) + 4 * (j % 5) for j in range(span.latents)]
    assert latent[0, 0, :, 0, 0].tolist() == ends
    assert ends[-1] == num_frames - 1


def test_a_continued_video_goes_on_from_its_last_frame_where_the_released_code_jumps():
    video, encoder = numbered(40), FrameEncoder()
    released, _ = place_references(
        torch.full((1, 4, 15, 2, 3), -1.0),
        [[encoder(video[None])[0]]],
        [parse_mask_strategy("0,0,-5,0,5")],
        segment=0,
        align=5,
    )
    assert released[0, 0, 4, 0, 0] == 33
    ours = references.encode_continued(encoder, video, GRID)
    assert ours[0, 0, :, 0, 0].tolist() == [23, 27, 31, 35, 39]
    assert encoder.lengths == [40, 17]


def test_spans_are_said_in_words():
    assert GivenSpan(17, 5).describe(40) == "goes on from the last 17 of 40 frames"
    assert GivenSpan(17, 5).describe(17) == "goes on from all 17 frames"


@pytest.mark.parametrize("encode", [references.encode_image, references.encode_end_image])
def test_an_image_gives_one_latent_frame_and_is_one_frame(encode):
    encoder = FrameEncoder()
    assert encode(encoder, torch.full((3, 1, 4, 6), 0.25), GRID).shape == (1, 4, 1, 2, 3)
    assert encoder.lengths == [17]
    with pytest.raises(ValueError, match=r"\(3, 1, pH, pW\).*\(3, 2, 4, 6\)"):
        encode(encoder, torch.zeros(3, 2, 4, 6), GRID)


@pytest.mark.slow
@torch.no_grad()
def test_images_decode_to_themselves_inside_a_video_where_the_released_way_loses():
    """With the packaged VAE: the latent frames of an image stand in those of a video, at its head and its end."""
    vae = VideoVAE.from_pretrained(resolve_model("shapes") / "vae").eval()
    frames = render_scene(sample_scene(np.random.default_rng(0), seconds=[2.125]), num_frames=17).frames
    video = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
    latent = vae.encode(video[None])
    for place, encode in ((0, references.encode_image), (-1, references.encode_end_image)):
        image = video[:, place][:, None]

        def quality(frame: Tensor, place: int = place, image: Tensor = image) -> float:
            placed = latent.clone()
            placed[:, :, place] = frame[:, :, 0]
            return psnr(vae.decode(placed, 17)[0, :, place], image[:, 0])

        whole = quality(latent[:, :, place][:, :, None])
        assert quality(encode(vae.encode, image, GRID)) > whole - 0.5
        assert quality(vae.encode(image[None])) < whole - 3


def test_given_frames_stand_at_both_ends_of_a_segment():
    head, tail = torch.randn(1, 4, 5, 2, 3), torch.randn(1, 4, 1, 2, 3)
    condition = references.condition_segment((1, 4, 15, 2, 3), head=head, tail=tail)
    assert condition.edit_ratio.tolist() == [[0.0] * 5 + [1.0] * 9 + [0.0]]
    torch.testing.assert_close(condition.latent, torch.cat((head, torch.zeros(1, 4, 9, 2, 3), tail), 2), rtol=0, atol=0)
    free = references.condition_segment((1, 4, 15, 2, 3))
    assert free.is_free.all()
    assert not free.latent.any()


def test_given_frames_that_do_not_fit_are_refused():
    head = torch.zeros(1, 4, 5, 2, 3)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 3, 2\).*\(1, 4, 5, 2, 3\)"):
        references.condition_segment((1, 4, 15, 3, 2), head=head)
    with pytest.raises(ValueError, match="6 of 6 latent frames"):
        references.condition_segment((1, 4, 6, 2, 3), head=head, tail=head[:, :, :1])
    with pytest.raises(ValueError, match="needs at least 1 frame, got 0"):
        references.given_span(0, GRID)


@pytest.mark.parametrize("align", [None, 5])
@pytest.mark.parametrize(
    "strategy", ["", "0", "0,1,-3,-2,9,0.25", "0;0,1,1,4,5,0.5;1,1", "0,0,0,7;0,1,0,2,6", "0,1,0,0,15", "0,2", "0,1,9"]
)
def test_edit_ratios_from_lengths_are_those_of_tensors(strategy: str, align: int | None):
    num_latents, lengths, groups = 15, (1, 7), parse_mask_strategy(strategy)
    sources = [[torch.zeros(1, length, 1, 1) for length in lengths]]
    for head in (0, 1, 5, 14, 15):
        for tail in (0, 1, 6):
            options = {"head": head, "tail": tail, "references": lengths, "placements": groups[:2], "align": align}
            ends = {name: torch.zeros(1, 1, n, 1, 1) if n else None for name, n in (("head", head), ("tail", tail))}
            try:
                placed = place_references(
                    torch.zeros(1, 1, num_latents, 1, 1), sources, [groups[:2]], segment=0, align=align
                )
                expected = references.condition_segment((1, 1, num_latents, 1, 1), **ends, placed=placed).edit_ratio
            except ValueError as error:
                with pytest.raises(ValueError, match=re.escape(str(error))):
                    references.plan_edit_ratios(num_latents, **options)
            else:
                assert references.plan_edit_ratios(num_latents, **options) == tuple(expected[0].tolist())
