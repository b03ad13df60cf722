"""Codes of a film from the code transformer: sampling, prompt switches, sliding windows, resumption.

At a prompt switch the text prefix is swapped and the codes so far are read again under it. When they outgrow the
context, the window slides on by a fixed number of code frames. Memory does not grow with the film.

A switch may be blended: code frame i of the new prompt's first k has the logits
lerp(old prompt's, new prompt's, (i + 1) / (k + 1)), both over the same codes, before guidance. So what is drawn comes
from the normalised product p_old^(1 - w) p_new^w of the two distributions, which holds what both find likely; text
features of two sentences have no such middle.

Source: ARLON, arXiv:2410.20502 (codes of the whole film first, progressive prompts). How the context is kept at a
switch and beyond the training length is ours.

Dimension key: S codes, K codebook size, L text tokens, E text width, cT cH cW code grid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arlon.models.ar import CodeTransformer, CodeTransformerConfig, KVCache, check_range


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptSpan:
    """Code frames written under one prompt."""

    text: Tensor
    """Text features, (1, L, E)."""
    num_code_frames: int
    """How many code frames this prompt holds for."""
    text_mask: Tensor | None = None
    """(1, L) bool, True = real token; all real if None."""
    blend: int = 0
    """Over how many of its first code frames the prompt before passes into this one; the first span has none before."""

    def __post_init__(self) -> None:
        if self.num_code_frames < 1:
            raise ValueError(f"a span needs at least one code frame, got {self.num_code_frames}")
        if self.blend < 0:
            raise ValueError(f"the blend of a span must not be negative, got {self.blend}")
        if self.text.ndim != 3 or self.text.shape[0] != 1:
            raise ValueError(f"a span holds one text (1, L, E), got {tuple(self.text.shape)}")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely code."""
    top_p: float = 0.95
    """Only the most likely codes that together hold this share of the probability are drawn; 1 = all."""
    guidance_scale: float = 3.0
    """Logits are null + scale * (text - null); 1 needs one row only."""
    stop_at_eos: bool = False
    """Let EOS end the last span early, at the start of a frame, as in the paper. Films leave it off: their storyboard
    decides how long they are."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.guidance_scale < 0:
            raise ValueError(
                "temperature and guidance_scale must not be negative and top_p must lie in (0, 1], got "
                f"temperature={self.temperature}, guidance_scale={self.guidance_scale}, top_p={self.top_p}"
            )


def blend_weight(frame: int, blend: int) -> float:
    """Weight of the new prompt at frame 0, 1, ... behind a switch: rises evenly between 0 and 1, 1 from `blend` on."""
    return min(1.0, (frame + 1) / (blend + 1))


def sample_code(logits: Tensor, uniform: float, *, temperature: float = 1.0, top_p: float = 1.0) -> int:
    """Draw one code by inverting the cumulative distribution of the nucleus (arXiv:1904.09751).

    Args:
        logits: (K,).
        uniform: In [0, 1): the one random number of this draw.
        temperature: 0 takes the most likely code.
        top_p: Share of probability to keep, (0, 1].
    """
    if temperature == 0:
        return int(logits.argmax())
    probability, order = (logits.float() / temperature).softmax(-1).sort(descending=True, stable=True)
    total = probability.cumsum(-1)
    last = int((total < top_p).sum().clamp(max=len(total) - 1))
    rank = int(torch.searchsorted(total, uniform * total[last], right=True))
    return int(order[min(rank, last)])


class CodeStream(Iterator[Tensor]):
    """Writes the code frames of one take, one at a time, in memory that does not grow with its length.

    At the first frame of every span the text prefix is swapped and the cache filled again. A full window slides
    by a fixed hop, and positions start again at 0 inside it. Both happen at frames that depend on the
    schedule alone, and a stream started from existing codes repeats the steps since the last of them: it goes
    on bit for bit as the uninterrupted one.
    """

    def __init__(
        self,
        model: CodeTransformer,
        schedule: Sequence[PromptSpan],
        *,
        generator_for_frame: Callable[[int], torch.Generator],
        sampling: SamplingConfig | None = None,
        existing: Tensor | None = None,
    ) -> None:
        """Prepare a stream.

        Args:
            model: In eval mode.
            schedule: Prompts in order; their code frames together are the take.
            generator_for_frame: Gives a freshly seeded CPU generator for a code frame index of the take; all
                draws of that frame come from it, so results depend neither on batching nor on resumption.
            sampling: Defaults if None.
            existing: First code frames of the take, already written, (1, n, cH, cW) int64. None: none.

        Raises:
            ValueError: If the schedule is empty or `existing` does not fit it.
            RuntimeError: If the model is in training mode.
        """
        if model.training:
            raise RuntimeError("the code transformer is in training mode; call model.eval() before writing codes")
        if not schedule:
            raise ValueError("a schedule needs at least one span, got none")
        self.model, self.schedule = model, tuple(schedule)
        self.sampling = sampling or SamplingConfig()
        self.num_code_frames = sum(span.num_code_frames for span in schedule)
        self.next_frame = 0
        self._generator_for_frame = generator_for_frame
        self._recent: deque[Tensor] = deque(maxlen=model.config.max_code_frames)
        self._cache: KVCache | None = None
        self._old_cache: KVCache | None = None
        """The same codes under the prompt before, while a switch is blended."""
        self._is_ended = False
        if existing is not None:
            self._accept(existing)

    def __next__(self) -> Tensor:
        """Write the next code frame, (cH, cW) int64.

        Raises:
            StopIteration: When the schedule is complete, or EOS was drawn under `stop_at_eos`.
        """
        if self._is_ended or self.next_frame >= self.num_code_frames:
            raise StopIteration
        count = self.model.config.codes_per_frame
        generator = self._generator_for_frame(self.next_frame)
        uniforms = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        codes = torch.empty(count, dtype=torch.int64)
        try:
            self._write(codes, uniforms)
        except BaseException:
            self._cache = self._old_cache = None  # half a frame is in them; a retry fills them again
            raise
        if self._is_ended:
            raise StopIteration
        self._recent.append(codes)
        self.next_frame += 1
        return codes.view(self.model.config.grid)

    @torch.inference_mode()
    def _write(self, codes: Tensor, uniforms: Sequence[float]) -> None:
        """Draw the codes (cH * cW,) of the next frame, a uniform number each, or note that the take ends."""
        for cell, uniform in enumerate(uniforms):
            logits = self._advance(codes[cell - 1]) if cell else self._first_logits()
            code = self._draw(logits, uniform, may_end=cell == 0)
            if code == self.model.config.codebook_size:
                self._is_ended = True
                return
            codes[cell] = code

    def _accept(self, existing: Tensor) -> None:
        """Take over the first frames of the take."""
        expected = self.model.config.grid
        if existing.ndim != 4 or existing.shape[0] != 1 or tuple(existing.shape[2:]) != tuple(expected):
            raise ValueError(
                f"expected existing codes (1, n, {expected[0]}, {expected[1]}), got {tuple(existing.shape)}"
            )
        if existing.shape[1] > self.num_code_frames:
            raise ValueError(f"{existing.shape[1]} existing code frames, but the schedule has {self.num_code_frames}")
        check_range(existing, self.model.config.codebook_size)
        self.next_frame = existing.shape[1]
        self._recent.extend(existing[0].flatten(1).cpu())

    def _first_logits(self) -> Tensor:
        """Logits of the first code of the next frame; fills the cache again if that is due."""
        window, read = _window_at(self.schedule, self.model.config, self.next_frame)
        if self._old_prompt() is None:
            self._old_cache = None
        if read == self.next_frame:
            return self._read(window, read)
        if self._cache is not None:
            return self._advance(self._recent[-1][-1])
        logits = self._read(window, read)
        for codes in list(self._recent)[read - self.next_frame :]:
            for code in codes:
                logits = self._advance(code)
        return logits

    def _read(self, window: int, stop: int) -> Tensor:
        """Prefill with the text in force and code frames [window, stop); logits of the next code."""
        first = self.next_frame - len(self._recent)
        frames = list(self._recent)[window - first : stop - first]
        codes = torch.cat(frames) if frames else torch.empty(0, dtype=torch.int64)
        rows = 1 if self.sampling.guidance_scale == 1 else 2
        logits, self._cache = self._prefill(_span_at(self.schedule, self.next_frame)[0], codes, rows)
        old, self._old_cache = self._old_prompt(), None
        if old is None:
            return self._guide(logits)
        old_logits, self._old_cache = self._prefill(old, codes, 1)
        return self._guide(logits, old_logits)

    def _prefill(self, span: PromptSpan, codes: Tensor, rows: int) -> tuple[Tensor, KVCache]:
        """Read codes (S,) under a prompt; logits of the next code (rows, K + 1), of rows [text] or [text, null]."""
        config = self.model.config
        device = self.model.head.weight.device
        text, mask = _trimmed(span)
        return self.model.prefill(
            codes.to(device).expand(rows, -1),
            text.to(device).expand(rows, -1, -1),
            mask.to(device).expand(rows, -1),
            max_codes=config.max_code_frames * config.codes_per_frame,
            drop_text=None if rows == 1 else torch.tensor([False, True], device=device),
        )

    def _advance(self, code: Tensor) -> Tensor:
        """Feed one code; logits of the next, (K + 1,)."""
        assert self._cache is not None
        rows = self._cache.keys.shape[1]
        code = code.to(self._cache.keys.device)
        logits = self.model.step(code.expand(rows), self._cache)
        if self._old_cache is None:
            return self._guide(logits)
        return self._guide(logits, self.model.step(code.expand(1), self._old_cache))

    def _old_prompt(self) -> PromptSpan | None:
        """The prompt that still passes into the one in force at the next frame."""
        place, start = _place_at(self.schedule, self.next_frame)
        is_blended = place > 0 and self.next_frame < start + self.schedule[place].blend
        return self.schedule[place - 1] if is_blended else None

    def _guide(self, logits: Tensor, old_logits: Tensor | None = None) -> Tensor:
        """Classifier-free guidance over the rows [text, null]; the text is blended with the prompt before, if given."""
        text = logits[0]
        if old_logits is not None:
            place, start = _place_at(self.schedule, self.next_frame)
            weight = blend_weight(self.next_frame - start, self.schedule[place].blend)
            text = torch.lerp(old_logits[0], text, weight)
        return text if len(logits) == 1 else torch.lerp(logits[1], text, self.sampling.guidance_scale)

    def _draw(self, logits: Tensor, uniform: float, *, may_end: bool) -> int:
        """Draw a code; EOS is masked while codes are owed."""
        last_span_start = self.num_code_frames - self.schedule[-1].num_code_frames
        if not (self.sampling.stop_at_eos and may_end and self.next_frame >= max(1, last_span_start)):
            logits = logits[:-1]
        return sample_code(logits, uniform, temperature=self.sampling.temperature, top_p=self.sampling.top_p)


def generate_codes(
    model: CodeTransformer,
    schedule: Sequence[PromptSpan],
    *,
    generator_for_frame: Callable[[int], torch.Generator],
    sampling: SamplingConfig | None = None,
    existing: Tensor | None = None,
    on_frame: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Write all codes of a take; see `CodeStream` for the arguments and errors.

    Args:
        model: In eval mode.
        schedule: Prompts in order.
        generator_for_frame: Gives a freshly seeded CPU generator for a code frame index.
        sampling: Defaults if None.
        existing: First code frames, already written, (1, n, cH, cW) int64; they lead the result.
        on_frame: Called with the index and the codes (cH, cW) of every new frame.

    Returns:
        (1, cT, cH, cW) int64.
    """
    stream = CodeStream(model, schedule, generator_for_frame=generator_for_frame, sampling=sampling, existing=existing)
    frames = [] if existing is None else list(existing[0].cpu())
    for codes in stream:
        if on_frame is not None:
            on_frame(len(frames), codes)
        frames.append(codes)
    return torch.stack(frames)[None]


def _span_at(schedule: Sequence[PromptSpan], frame: int) -> tuple[PromptSpan, int]:
    """The span in force at a code frame, and its first code frame."""
    place, start = _place_at(schedule, frame)
    return schedule[place], start


def _place_at(schedule: Sequence[PromptSpan], frame: int) -> tuple[int, int]:
    """Place in the schedule of the span in force at a code frame, and its first code frame."""
    start = 0
    for place, span in enumerate(schedule[:-1]):
        if frame < start + span.num_code_frames:
            return place, start
        start += span.num_code_frames
    return len(schedule) - 1, start


def _window_at(schedule: Sequence[PromptSpan], config: CodeTransformerConfig, frame: int) -> tuple[int, int]:
    """First code frame of the window at `frame`, and the frame at which the cache was last filled from the start."""
    _, read = _span_at(schedule, frame)
    window = max(0, read - (config.max_code_frames - config.hop))
    overflow = frame - (window + config.max_code_frames)
    if overflow < 0:
        return window, read
    slides = overflow // config.hop + 1
    return window + slides * config.hop, window + config.max_code_frames + (slides - 1) * config.hop


def _trimmed(span: PromptSpan) -> tuple[Tensor, Tensor]:
    """Text and mask of a span without the padding at its end; at least one slot."""
    mask = torch.ones(span.text.shape[:2], dtype=torch.bool) if span.text_mask is None else span.text_mask
    length = max(1, int(mask[0].nonzero().max()) + 1 if mask.any() else 1)
    return span.text[:, :length], mask[:, :length].to(span.text.device)
