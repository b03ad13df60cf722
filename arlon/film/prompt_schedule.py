"""Which prompt is in force where: in the code frames of a take, and in the latent frames of a segment."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from arlon.film.plan import Plan, Segment, Take
from arlon.film.storyboard import ResolvedStoryboard
from arlon.models.code_sampling import blend_weight
from arlon.text.prompts import add_scores


@dataclass(frozen=True, kw_only=True)
class ScheduledPrompt:
    """One prompt of a take and the code frames that are written under it."""

    prompt: str
    seed: int
    blend: int
    """Code frames, from its first one on, over which the prompt before passes into it; 0 switches at once."""
    num_code_frames: int


@dataclass(frozen=True)
class PromptSchedule:
    """The prompts of a take in order, as the code model reads them."""

    spans: tuple[ScheduledPrompt, ...]

    def prompts(self, start: int, stop: int) -> tuple[str, ...]:
        """Prompts that code frames [start, stop) depend on, each once; during a blend also the prompt before."""
        if start >= stop:
            return ()
        prompts: dict[str, None] = {}
        for place in range(self.index_at(start), self.index_at(stop - 1) + 1):
            first = self._ends[place - 1] if place else 0
            if place and max(start, first) < first + self.spans[place].blend:
                prompts[self.spans[place - 1].prompt] = None
            prompts[self.spans[place].prompt] = None
        return tuple(prompts)

    def at(self, frame: int) -> ScheduledPrompt:
        """The prompt in force at a code frame.

        Raises:
            ValueError: If the take has no such code frame.
        """
        return self.spans[self.index_at(frame)]

    def index_at(self, frame: int) -> int:
        """Index in `spans` of the prompt in force at a code frame.

        Raises:
            ValueError: If the take has no such code frame.
        """
        if not 0 <= frame < self._ends[-1]:
            raise ValueError(f"the take has {self._ends[-1]} code frames, there is no frame {frame}")
        return bisect_right(self._ends, frame)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(span.num_code_frames for span in self.spans))


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How the prompt of the shot before passes into the prompt of a segment."""

    prompt: str
    """The prompt of the shot before."""
    weights: tuple[float, ...]
    """Share of the segment's own prompt in each of its latent frames, those carried over included, in [0, 1]."""


def encoder_prompt(film: ResolvedStoryboard, shot: int) -> str:
    """Text that the encoder reads for a shot: its prompt, then the scores and camera motion that the film asks for."""
    of_shot = film.shots[shot]
    return add_scores(
        of_shot.prompt,
        aesthetic=film.aesthetic_score or None,
        motion=film.motion_score or None,
        camera=of_shot.camera_motion or film.camera_motion,
    )


def code_schedule(plan: Plan, take: Take) -> PromptSchedule:
    """Schedule of a take; shots too short to own a code frame are not in it."""
    film = plan.storyboard
    return PromptSchedule(
        tuple(
            ScheduledPrompt(
                prompt=encoder_prompt(film, shot),
                seed=film.seed_of(shot),
                blend=(film.shots[shot].blend or 0) if place else 0,  # nothing precedes the first shot
                num_code_frames=count,
            )
            for place, (shot, count) in enumerate(take.spans)
        )
    )


def segment_blend(plan: Plan, segment: Segment, take: Take) -> Blend | None:
    """Blend of a segment; None if its shot switches at once, or if the blend is over before its new latent frames.

    The weights are those of the code frames that cover the latent frames. A latent frame of the shot that lies in a
    code frame of the shot before gets the weight of the first code frame of the shot.
    """
    blend = plan.storyboard.shots[segment.shot].blend
    place, switch = plan.places.get(segment.shot, (0, 0))
    if not place or not blend:
        return None
    ratio = plan.geometry.code_ratio[0]
    latents = range(segment.start_latent, segment.start_latent + segment.num_latents)
    weights = tuple(blend_weight(max(0, latent // ratio - switch), blend) for latent in latents)
    if min(weights[segment.overlap :]) == 1:
        return None
    return Blend(prompt=encoder_prompt(plan.storyboard, take.spans[place - 1][0]), weights=weights)
