"""Cutting a video or its latent into pieces, chunks in time and tiles in space, and joining them; no networks.

Dimension key as in `arlon.models.video_vae`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from arlon.grids import ceil_div

TILE_OVERLAP = 0.25
"""Share of its side, about, that a tile has in common with each neighbour."""
MIN_TILE = 4
"""Shortest side of a tile, in latents."""


def checked_pieces(parts: Iterable[Tensor], check: Callable[[Tensor], None]) -> Iterator[Tensor]:
    """The pieces (B, C, n, H, W) as they come, each checked, and held against the first but for n."""
    first: tuple[int, ...] | None = None
    for part in parts:
        check(part)
        size = (*part.shape[:2], *part.shape[3:])
        first = first or size
        if size != first:
            raise ValueError(f"pieces must agree in (B, C, H, W): expected {first} as the first, got {size}")
        yield part


def regroup(parts: Iterable[Tensor], size: int | None) -> Iterator[Tensor]:
    """Cut consecutive pieces (B, C, n, H, W) again, into `size` frames each, the last with what is left; None: all."""
    held: list[Tensor] = []
    missing = size
    for part in parts:
        while part.shape[2]:
            head = part if missing is None else part[:, :, :missing]
            part = part[:, :, head.shape[2] :]
            held.append(head)
            if missing is not None:
                missing -= head.shape[2]
            if missing == 0:
                yield join_chunks(held)
                held, missing = [], size
    if held:
        yield join_chunks(held)


def within(parts: Iterable[Tensor], frames: slice) -> Iterator[Tensor]:
    """What consecutive pieces (B, C, n, H, W) have of `frames`, counted from the start of the first piece.

    Raises:
        ValueError: If `frames` has a step, or counts from the end.
    """
    start, stop = frames.start or 0, frames.stop
    if frames.step not in (None, 1) or start < 0 or (stop is not None and stop < 0):
        raise ValueError(f"frames must be consecutive and counted from the start, got {frames}")
    at = 0
    for part in parts:
        kept = part[:, :, max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += part.shape[2]
        if kept.shape[2]:
            yield kept


def join_chunks(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def border_window(chunk: int, stride: int, available: int, wanted: int) -> tuple[int, int]:
    """Frames before and after the border of a chunk that are coded together, `available` of them being there after it.

    One frame and then groups of `stride` frames, like a chunk and no longer, with the border in the middle of a group;
    as many groups as it takes for `wanted` frames on both sides.
    """
    most = ((chunk - 1) // stride - 1) // 2
    whole = min(most, max(0, ceil_div(wanted - 1 - stride // 2, stride)))
    before = 1 + stride * whole + stride // 2
    after = min(available, chunk - before, 1 + 2 * stride * (whole + 1) - before)
    surplus = (before + after - 1) % stride
    # A single frame after the border ends a group instead: it cannot be half of one.
    return (before, after - surplus) if after > surplus else (stride, after)


def ramp(length: int, like: Tensor) -> Tensor:
    """Weights (length, 1, 1) rising evenly between 0 and 1, both left out."""
    steps = torch.arange(length, device=like.device, dtype=torch.float32)
    return ((steps + 0.5) / length).to(like.dtype).view(-1, 1, 1)


def by_tile(
    run: Callable[[Tensor], Tensor], x: Tensor, side: int | None, *, unit_in: int = 1, unit_out: int = 1
) -> Tensor:
    """Apply `run` to overlapping squares of x (..., H * unit_in, W * unit_in) and feather the results together.

    Args:
        run: Maps (..., h * unit_in, w * unit_in) to (..., h * unit_out, w * unit_out) for any h, w.
        x: What to cut. Surplus rows and columns, fewer than `unit_in`, go with the last tile.
        side: Of a tile, in units. None, or a frame that is no larger: `run(x)`.
        unit_in: Values of x in a unit of length.
        unit_out: Values of the result in a unit of length.
    """
    height, width = x.shape[-2] // unit_in, x.shape[-1] // unit_in
    if side is None or max(height, width) <= side:
        return run(x)
    joined: Tensor | None = None
    for top, bottom, row_weights in _tiles(height, side, unit_out):
        for left, right, column_weights in _tiles(width, side, unit_out):
            rows = slice(top * unit_in, None if bottom == height else bottom * unit_in)
            columns = slice(left * unit_in, None if right == width else right * unit_in)
            part = run(x[..., rows, columns])
            if joined is None:
                joined = part.new_zeros(*part.shape[:-2], height * unit_out, width * unit_out)
            weights = row_weights[:, None] * column_weights
            place = (..., slice(top * unit_out, bottom * unit_out), slice(left * unit_out, right * unit_out))
            joined[place] += part * weights.to(part)
    assert joined is not None
    return joined


def num_tiles(length: int, side: int) -> int:
    """Tiles of an axis."""
    return 1 if length <= side else ceil_div(length - _overlap(side), side - _overlap(side))


def _overlap(side: int) -> int:
    return max(1, int(side * TILE_OVERLAP))


def _tiles(length: int, side: int, unit: int) -> list[tuple[int, int, Tensor]]:
    """Tiles of an axis: start and stop in units, and weights (n,) of its `n = (stop - start) * unit` values.

    All tiles are equally long, since norms are taken over a tile. Weights of all tiles sum to 1 everywhere.
    """
    if length <= side:
        return [(0, length, torch.ones(length * unit))]
    overlap, count = _overlap(side), num_tiles(length, side)
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    steps = (torch.arange(side * unit) + 0.5) / (overlap * unit)
    feather = torch.minimum(steps, steps.flip(0)).clamp(max=1)
    total = torch.zeros(length * unit)
    for start in starts:
        total[start * unit : (start + side) * unit] += feather
    return [(start, start + side, feather / total[start * unit : (start + side) * unit]) for start in starts]
