"""The velocity of a segment against the same thing written out with plain forward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arlon.backbones import STDiT3Backbone
from arlon.diffusion.denoiser import Denoiser, GuidedPrompt
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.protocols import VideoSize
from arlon.text.encoders import TextFeatures

SIZE = VideoSize(height=32.0, width=48.0, fps=8.0)
CONDITIONS = {"height": 32.0, "width": 48.0, "fps": 8.0}


def features(seed: int, num_tokens: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 4, 5, generator=generator)
    mask = torch.arange(4)[None] < num_tokens
    return TextFeatures(tokens, mask, tokens.mean(1))


@pytest.fixture(scope="module")
def dit() -> STDiT3:
    torch.manual_seed(0)
    config = STDiT3Config(hidden_size=16, depth=2, num_heads=2, caption_channels=5, model_max_length=4)
    dit = STDiT3(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.3)
    dit.y_embedder.y_embedding.normal_()
    return dit


def written_out(dit: STDiT3, x: Tensor, t: Tensor, mask: Tensor, prompt: GuidedPrompt, inject: object) -> Tensor:
    """v_null + g (v_text - v_null), each a pass of its own."""
    text, negative = prompt.text, prompt.negative
    common = {"frame_mask": mask, "inject": inject, **CONDITIONS}
    conditional = dit(x, t, text.tokens, text.mask, **common)
    if negative is None:
        null = dit(x, t, dit.null_text(4)[None], text.mask, **common)
    else:
        null = dit(x, t, negative.tokens, negative.mask, **common)
    return null + prompt.guidance_scale * (conditional - null)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("has_negative", [False, True])
@pytest.mark.parametrize("is_blended", [False, True])
def test_velocity_is_the_formula(dit: STDiT3, scale: float, has_negative: bool, is_blended: bool) -> None:
    negative = features(9, 2) if has_negative else None
    new, old = (GuidedPrompt(text=features(i, 2 + i), guidance_scale=scale, negative=negative) for i in (1, 2))
    share = torch.tensor([0.25, 0.5, 1.0])
    x, t = torch.randn(1, 4, 3, 4, 6), torch.tensor([0.6])
    mask = torch.tensor([[False, True, True]])

    def inject(i: int, y: Tensor) -> Tensor:
        return y * (1.5 + i)

    blend = {"old_prompt": old, "new_share": share} if is_blended else {}
    got = Denoiser(STDiT3Backbone(dit), new, size=SIZE, inject=inject, **blend)(x, t, mask)
    expected = written_out(dit, x, t, mask, new, inject)
    if is_blended:
        expected = torch.lerp(written_out(dit, x, t, mask, old, inject), expected, share[:, None, None])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_texts_are_prepared_once_for_all_steps_and_masks(dit: STDiT3, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = STDiT3.prepare_text
    monkeypatch.setattr(STDiT3, "prepare_text", lambda *given: prepared.append(given) or prepare(*given))
    denoiser = Denoiser(STDiT3Backbone(dit), GuidedPrompt(text=features(1, 3), guidance_scale=2.0), size=SIZE)
    for frames in ([False, False, True], [False, True, True], [True, True, True]):
        denoiser(torch.randn(1, 4, 3, 4, 6), torch.tensor([0.5]), torch.tensor([frames]))
    assert len(prepared) == 1


def test_a_blend_without_its_share_is_refused(dit: STDiT3) -> None:
    prompt = GuidedPrompt(text=features(1, 3), guidance_scale=2.0)
    with pytest.raises(ValueError, match="share"):
        Denoiser(STDiT3Backbone(dit), prompt, size=SIZE, old_prompt=prompt)
