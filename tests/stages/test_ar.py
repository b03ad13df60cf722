"""What the stage of the code transformer shows its model."""

from __future__ import annotations

import pytest
import torch

from stages.ar import ARStageConfig, replace_codes


def test_the_asked_share_of_codes_is_replaced_by_codes_of_the_codebook():
    codes = torch.full((64, 128), 7)
    noisy = replace_codes(codes, 0.25, 32, torch.Generator().manual_seed(0))
    again = replace_codes(codes, 0.25, 32, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)
    assert (noisy != codes).float().mean() == pytest.approx(0.25 * 31 / 32, abs=0.02)  # one in 32 is drawn as it was
    assert set(noisy.unique().tolist()) == set(range(32))
    assert (codes == 7).all()


def test_without_code_noise_codes_stay_and_nothing_is_drawn():
    codes, generator = torch.arange(12).reshape(3, 4), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert replace_codes(codes, 0.0, 12, generator) is codes
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"code_noise must be in \[0, 1\)"):
        ARStageConfig(code_noise=share)
