"""Classifier-free guidance: the formula, one call, and what each half sees."""

import pytest
import torch
from torch import Tensor

from arlon.diffusion.guidance import guide
from arlon.models.stdit import STDiT3, STDiT3Config
from tests.closeness import assert_close_to_scale


class Recorder:
    """A model that returns the mean of its kept text; keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **conditions) -> Tensor:
        self.calls.append({"x": x, "t": t, "text": text, "text_mask": text_mask, **conditions})
        kept = text if text_mask is None else text * text_mask[..., None]
        return x + kept.sum(dim=(1, 2))[:, None]


X, T = torch.randn(2, 3), torch.tensor([0.3, 0.8])
TEXT, NULL = torch.randn(2, 4, 5), torch.randn(4, 5)
MASK = torch.tensor([[True, True, False, False], [True, False, False, False]])


def test_guidance_is_the_formula():
    model = Recorder()
    got = guide(model, TEXT, NULL, guidance_scale=3.0, text_mask=MASK)(X, T)
    conditional = Recorder()(X, T, TEXT, MASK)
    null = Recorder()(X, T, NULL.expand(2, -1, -1), MASK)
    torch.testing.assert_close(got, null + 3 * (conditional - null))
    assert len(model.calls) == 1


def test_null_half_uses_the_token_count_of_the_prompt():
    model = Recorder()
    guide(model, TEXT, NULL, guidance_scale=2.0, text_mask=MASK)(X, T)
    assert torch.equal(model.calls[0]["text_mask"], torch.cat((MASK, MASK)))
    negative = torch.tensor([[True] * 4, [False] * 4])
    guide(model, TEXT, TEXT.flip(0), guidance_scale=2.0, text_mask=MASK, null_mask=negative)(X, T)
    assert torch.equal(model.calls[1]["text_mask"], torch.cat((MASK, negative)))
    guide(model, TEXT, NULL, guidance_scale=2.0, null_mask=negative)(X, T)
    assert torch.equal(model.calls[2]["text_mask"], torch.cat((torch.ones_like(MASK), negative)))


def test_a_prompt_of_n_tokens_is_compared_with_n_rows_of_the_null_caption():
    config = STDiT3Config(hidden_size=16, depth=1, num_heads=2, caption_channels=5, model_max_length=4)
    dit = STDiT3(config).eval()
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.3)
    dit.y_embedder.y_embedding.normal_()
    x, t, sizes = torch.randn(2, 4, 3, 4, 6), torch.tensor([0.3, 0.8]), {"fps": 8.0, "height": 32.0, "width": 48.0}
    with torch.no_grad():
        got = guide(dit, TEXT, dit.null_text(4), guidance_scale=7.0, text_mask=MASK, **sizes)(x, t)
        for i, count in enumerate(MASK.sum(dim=1).tolist()):
            one = slice(i, i + 1)
            conditional = dit(x[one], t[one], TEXT[one, :count], **sizes)
            null = dit(x[one], t[one], dit.null_text(count)[None], **sizes)
            assert_close_to_scale(got[one], null + 7 * (conditional - null))
            whole = dit(x[one], t[one], dit.null_text(4)[None], **sizes)
            assert (whole - null).abs().max() > 1e-3


def test_scale_one_costs_one_forward_of_the_batch():
    model = Recorder()
    got = guide(model, TEXT, NULL, guidance_scale=1, text_mask=MASK, fps=8.0)(X, T)
    torch.testing.assert_close(got, Recorder()(X, T, TEXT, MASK))
    assert len(model.calls) == 1
    assert model.calls[0]["x"].shape[0] == 2


def test_other_conditions_are_in_both_halves():
    model, inject = Recorder(), object()
    mask, fps = torch.tensor([[True], [False]]), torch.tensor([8.0, 24.0])
    guide(model, TEXT, NULL, guidance_scale=2.0, frame_mask=mask, fps=fps, height=64, inject=inject)(X, T)
    call = model.calls[0]
    assert torch.equal(call["frame_mask"], torch.cat((mask, mask)))
    assert call["fps"].tolist() == [8, 24, 8, 24]
    assert call["t"].tolist() == pytest.approx([0.3, 0.8, 0.3, 0.8])
    assert call["height"] == 64
    assert call["inject"] is inject


def test_texts_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="Pad both to one length"):
        guide(Recorder(), TEXT, NULL[:3], guidance_scale=2.0)


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_one_negative_prompt_serves_a_batch_and_so_does_its_mask(rows: int | None):
    negative, mask = torch.randn(4, 5), torch.tensor([True, True, True, False])
    model, shape = Recorder(), (() if rows is None else (rows,))
    given = {"null_text": negative.expand(*shape, 4, 5), "null_mask": mask.expand(*shape, 4)}
    guide(model, TEXT, guidance_scale=2.0, text_mask=MASK, **given)(X, T)
    assert torch.equal(model.calls[0]["text"][2:], torch.stack((negative, negative)))
    assert torch.equal(model.calls[0]["text_mask"], torch.cat((MASK, mask.expand(2, 4))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null_mask": MASK[:, :3]}, r"null_mask must be .*: \(4,\), \(1, 4\) or \(2, 4\), got \(2, 3\)"),
        ({"null_mask": MASK[[0, 1, 0]]}, r"null_mask must be .*, got \(3, 4\)"),
        ({"text_mask": MASK[:1]}, r"text_mask must be \(B, L\) = \(2, 4\), got \(1, 4\)"),
        ({"null_text": NULL.expand(3, 4, 5)}, r"null_text must be .* each of 2: .*, got \(3, 4, 5\)"),
    ],
)
def test_masks_and_texts_of_another_batch_are_refused(change: dict[str, Tensor], message: str):
    given = {"null_text": NULL, "text_mask": MASK, "null_mask": MASK} | change
    with pytest.raises(ValueError, match=message):
        guide(Recorder(), TEXT, guidance_scale=2.0, **given)
