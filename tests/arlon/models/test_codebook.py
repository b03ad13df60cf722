"""The codebook against vector-quantize-pytorch, with which the first models were trained."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from arlon.models.codebook import Codebook, rotate_to
from arlon.models.vqvae import LatentVQVAEConfig
from tests.closeness import assert_close_to_scale

BASE = {"codebook_size": 24, "code_dim": 5, "decay": 0.8, "kmeans_iters": 4}


def both(**settings: Any) -> tuple[Codebook, Any]:
    """Our codebook and the library's, with the same settings and the same start."""
    library = pytest.importorskip("vector_quantize_pytorch")
    config = LatentVQVAEConfig(**(BASE | settings))
    theirs = library.VectorQuantize(
        dim=config.code_dim,
        codebook_size=config.codebook_size,
        decay=config.decay,
        commitment_weight=1.0,
        use_cosine_sim=config.use_cosine_sim,
        threshold_ema_dead_code=config.dead_code_threshold,
        kmeans_init=config.kmeans_init,
        kmeans_iters=config.kmeans_iters,
        rotation_trick=config.rotation_trick,
    )
    ours = Codebook(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.train(), theirs.train()


@pytest.mark.parametrize(
    ("cosine", "kmeans", "rotation"), list(itertools.product([True, False], [True, False], [True, False]))
)
@pytest.mark.parametrize(("threshold", "rows"), [(0.0, 40), (0.4, 40), (1.5, 9)])
def test_training_equals_the_library(cosine: bool, kmeans: bool, rotation: bool, threshold: float, rows: int) -> None:
    """Over several batches: codes, vectors, commitment, gradients and every buffer; restarts and k-means draw alike."""
    settings = {"use_cosine_sim": cosine, "kmeans_init": kmeans, "rotation_trick": rotation}
    ours, theirs = both(**settings, dead_code_threshold=threshold)
    for step in range(6):
        z = torch.randn(rows, 5, generator=torch.Generator().manual_seed(step))
        direction = torch.randn(rows, 5, generator=torch.Generator().manual_seed(100 + step))
        one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
        torch.manual_seed(step)
        vectors, codes, commitment = ours(one)
        torch.manual_seed(step)
        their_vectors, their_codes, their_commitment = theirs(two[None])
        assert torch.equal(codes, their_codes[0])
        assert_close_to_scale(vectors, their_vectors[0], relative=1e-6)
        assert_close_to_scale(commitment, their_commitment, relative=1e-6)
        (vectors * direction).sum().add(0.3 * commitment).backward()
        (their_vectors[0] * direction).sum().add(0.3 * their_commitment).backward()
        assert_close_to_scale(one.grad, two.grad, relative=2e-6)
        for name, tensor in theirs.state_dict().items():
            assert_close_to_scale(ours.state_dict()[name].float(), tensor.float(), relative=1e-6)


def test_evaluation_equals_the_library_and_changes_nothing() -> None:
    ours, theirs = both(kmeans_init=False)
    ours.eval(), theirs.eval()
    z = torch.randn(30, 5)
    vectors, codes, _ = ours(z)
    their_vectors, their_codes, _ = theirs(z[None])
    assert torch.equal(codes, their_codes[0])
    assert_close_to_scale(vectors, their_vectors[0], relative=1e-6)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_rotation_leads_to_the_code_and_keeps_angles_of_gradients() -> None:
    """The gradient is turned as the vector is: its angle to z is the angle that it had to the code."""
    z, codes = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    rotated = rotate_to(z, codes)
    assert_close_to_scale(rotated.detach(), codes, relative=1e-5)
    gradient = torch.randn(7, 5)
    rotated.backward(gradient)
    before = F.cosine_similarity(gradient, codes)
    after = F.cosine_similarity(z.grad, z.detach())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_draws_need_no_global_generator() -> None:
    books = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        book = Codebook(LatentVQVAEConfig(**BASE)).train()
        state = torch.get_rng_state()
        book(torch.linspace(-1, 1, 200).view(40, 5), torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), state)
        books.append(book.vectors)
    assert torch.equal(*books)
