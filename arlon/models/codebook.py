"""A codebook that follows what is rounded to it: nearest code, moving averages, restart of codes that are not used.

Source: van den Oord et al., arXiv:1711.00937, appendix A.1 (moving averages in place of a gradient); Yu et al.,
arXiv:2110.04627 (codes on the unit sphere); Fifty et al., arXiv:2410.06424, section 4.2 (gradients by rotation);
Zeghidour et al., arXiv:2107.03312 (start by k-means, restart of dead codes).

Updates, constants and names of the buffers are those of vector-quantize-pytorch, with which the first models were
trained, so that their weights load and their training goes on.

Dimension key: N vectors, K codes, d code dimension.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOOKUP_ROWS = 4096
"""Vectors compared with the codebook at a time: bounds the similarity matrix of a long film."""
SMOOTHING = 1e-5
"""Uses that every code is given on top of its own, so that no moving average is divided by zero."""
SMALLEST_NORM = 1e-6


class CodebookConfig(Protocol):
    """Fields that a codebook reads; see `arlon.models.vqvae.LatentVQVAEConfig`, which has them."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def code_dim(self) -> int: ...

    @property
    def decay(self) -> float: ...

    @property
    def use_cosine_sim(self) -> bool: ...

    @property
    def rotation_trick(self) -> bool: ...

    @property
    def dead_code_threshold(self) -> float: ...

    @property
    def kmeans_init(self) -> bool: ...

    @property
    def kmeans_iters(self) -> int: ...


class Quantized(NamedTuple):
    """Vectors rounded to their codes."""

    vectors: Tensor
    """(N, d): the code vectors, through which gradients reach the encoder."""
    codes: Tensor
    """(N,) int64."""
    commitment: Tensor
    """Scalar: mean squared distance of the vectors from their codes, whose gradient moves the encoder alone."""


class CodebookState(nn.Module):
    """Buffers of a codebook. The leading 1 of their shapes counts codebooks, of which there is one."""

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        size = (1, config.codebook_size, config.code_dim)
        if config.kmeans_init:
            start = torch.zeros(size)
        else:
            start = nn.init.kaiming_uniform_(torch.empty(size))
            start = F.normalize(start, dim=-1, eps=SMALLEST_NORM) if config.use_cosine_sim else start
        self.register_buffer("initted", torch.tensor(not config.kmeans_init))
        """Whether k-means has set the codes; before that they are zeros."""
        self.register_buffer("cluster_size", torch.ones(size[:2]))
        """Moving average of the uses of each code in a batch, (1, K)."""
        self.register_buffer("embed_avg", start.clone())
        """Moving average of the sum of the vectors that are rounded to each code, (1, K, d)."""
        self.register_buffer("embed", start)
        """The codes, (1, K, d)."""


class Codebook(nn.Module):
    """K code vectors, kept as moving averages of the vectors that are rounded to them."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self._codebook = CodebookState(config)  # the name that stored weights have

    @property
    def vectors(self) -> Tensor:
        """The codes, (K, d) float32."""
        return self._codebook.embed[0].float()

    @property
    def is_initialised(self) -> bool:
        """Whether the codes are more than zeros that wait for k-means."""
        return bool(self._codebook.initted)

    def compared(self, z: Tensor) -> Tensor:
        """The form of z (..., d) in which it is compared with codes: on the unit sphere for cosine similarity."""
        return F.normalize(z, dim=-1, eps=SMALLEST_NORM) if self.config.use_cosine_sim else z

    def nearest(self, z: Tensor) -> Tensor:
        """Codes (...,) int64 of z (..., d)."""
        return self._nearest(self.compared(z), self.vectors)

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Round z (N, d) to its codes; in training mode the codes then move towards what was rounded to them.

        Args:
            z: Output of the encoder, float32.
            generator: CPU generator that k-means and restarts draw from; the global one if None.
        """
        x = self.compared(z)
        draws = None
        if self.training and generator is not None:
            draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if self.training and not self.is_initialised:
            self._start(x.detach(), draws)
        codes = self._nearest(x.detach(), self.vectors)
        vectors = self.vectors[codes]  # a copy: the codes move below
        if self.training:
            self._follow(x.detach(), codes, draws)
        commitment = F.mse_loss(vectors, x)
        if self.training and x.requires_grad:
            vectors = rotate_to(x, vectors) if self.config.rotation_trick else x + (vectors - x).detach()
        return Quantized(vectors, codes, commitment)

    def _nearest(self, x: Tensor, vectors: Tensor) -> Tensor:
        # The largest product is the smallest distance: on the unit sphere, or with half the squared length of a code
        # taken away.
        bias = None if self.config.use_cosine_sim else -0.5 * vectors.square().sum(-1)
        rows = x.flatten(0, -2).split(LOOKUP_ROWS)
        return torch.cat([F.linear(chunk, vectors, bias).argmax(-1) for chunk in rows]).view(x.shape[:-1])

    @torch.no_grad()
    def _start(self, x: Tensor, draws: torch.Generator | None) -> None:
        """K-means of the first batch x (N, d): means of vectors, or directions for cosine similarity."""
        state, size = self._codebook, self.config.codebook_size
        means = _draw(x, size, draws)
        for _ in range(self.config.kmeans_iters):
            uses, sums = _sums(x, self._nearest(x, means), size)
            new = self.compared(sums / uses.clamp(min=1)[:, None])
            means = torch.where(uses[:, None] == 0, means, new)  # a mean that nothing is near stays where it is
        state.cluster_size.copy_(uses)
        state.embed_avg.copy_(means * uses[:, None])
        self._renew()
        state.initted.fill_(True)

    @torch.no_grad()
    def _follow(self, x: Tensor, codes: Tensor, draws: torch.Generator | None) -> None:
        """Move the averages by the batch x (N, d) and its codes (N,), then restart dead codes."""
        state, threshold = self._codebook, self.config.dead_code_threshold
        uses, sums = _sums(x, codes, self.config.codebook_size)
        state.cluster_size.lerp_(uses[None], 1 - self.config.decay)
        state.embed_avg.lerp_(sums[None], 1 - self.config.decay)
        self._renew()
        dead = (state.cluster_size[0] < threshold).nonzero()[:, 0]
        if len(dead) == 0:
            return
        if len(dead) > len(x):  # more than there are vectors: the others wait for later batches
            dead = dead[_permutation(len(dead), draws)[: len(x)].to(dead.device)]
            dead = dead.sort().values
        restarted = _draw(self.compared(x), len(dead), draws)
        state.embed[0, dead] = restarted
        state.cluster_size[0, dead] = threshold
        state.embed_avg[0, dead] = restarted * threshold

    def _renew(self) -> None:
        """Set the codes to the means that the moving averages stand for."""
        state = self._codebook
        total = state.cluster_size.sum()
        uses = (state.cluster_size + SMOOTHING) / (total + self.config.codebook_size * SMOOTHING) * total
        state.embed.copy_(self.compared(state.embed_avg / uses[..., None]))


def rotate_to(z: Tensor, codes: Tensor) -> Tensor:
    """Code vectors (N, d) with the gradient of the rotation and scaling that takes z (N, d) there.

    arXiv:2410.06424 section 4.2: q = |q| / |z| (z - 2 (z . r) r + 2 (z . u) v), with the unit vectors u of z, v of q
    and r of u + v. All but the z that is rotated count as constants.
    """
    z_norm = z.norm(dim=-1, keepdim=True)
    norm = codes.norm(dim=-1, keepdim=True)
    u = (z / z_norm.clamp(min=SMALLEST_NORM)).detach()
    v = codes / norm.clamp(min=SMALLEST_NORM)
    r = F.normalize(u + v, dim=-1, eps=SMALLEST_NORM)
    rotated = z - 2 * (z * r).sum(-1, keepdim=True) * r + 2 * (z * u).sum(-1, keepdim=True) * v
    return rotated * (norm / z_norm.clamp(min=SMALLEST_NORM)).detach()


def _sums(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Uses (K,) of each code, and the sum (K, d) of the vectors x (N, d) that have it."""
    one_hot = F.one_hot(codes, size).to(x.dtype)  # a product of matrices adds in the same order on every run
    return one_hot.sum(0), one_hot.T @ x


def _draw(x: Tensor, count: int, draws: torch.Generator | None) -> Tensor:
    """`count` of the vectors x (N, d): different ones if there are enough."""
    if len(x) >= count:
        chosen = _permutation(len(x), draws)[:count]
    else:
        chosen = torch.randint(0, len(x), (count,), generator=draws)
    return x[chosen.to(x.device)]


def _permutation(count: int, draws: torch.Generator | None) -> Tensor:
    return torch.randperm(count, generator=draws)
