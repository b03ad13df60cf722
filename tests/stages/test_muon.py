import pytest
import torch
from torch import nn

from stages.muon import MuonWithAdamW, orthogonalize


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (7, 7)])
def test_orthogonal_factor_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalize(matrix, torch.float32) @ vh.T
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 1e-4
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.25


def test_update_has_the_size_of_adamw() -> None:
    weight = nn.Parameter(torch.zeros(32, 16, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    MuonWithAdamW([weight], lr=0.1).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)


def test_kernels_are_seen_as_matrices() -> None:
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    kernel, matrix = nn.Parameter(torch.zeros(8, 4, 3, 3)), nn.Parameter(torch.zeros(8, 36))
    kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
    MuonWithAdamW([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_matrices_equal_torch_muon() -> None:
    start = torch.randn(24, 10, generator=torch.Generator().manual_seed(3))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = MuonWithAdamW([ours], lr=0.02, weight_decay=0.1)
    torch_muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in ((ours, mine), (theirs, torch_muon)):
            parameter.grad = gradient.clone()
            optimizer.step()
    difference = (ours - theirs).detach().norm() / (theirs - start).detach().norm()
    assert difference < 0.03, "both iterate in bfloat16, so a per cent is expected"


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got parameters of shapes \[\(5,\)\]"):
        MuonWithAdamW([nn.Parameter(torch.zeros(5))])
