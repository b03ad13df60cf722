"""Test cases of the shapes world: prompts for a model, and scores of how well films follow them.

A *case* is a take to make: one prompt a shot, joined without a cut, and a seed. `sample_cases` draws cases, a
model makes their frames, `oracle.read_clip` reads every shot, and the functions here turn readings into figures:
one value a case and attribute, in [0, 1], NaN if the attribute cannot be seen or was not asked for.
`render_case` renders what a perfect model would show; its figures are what the oracle allows at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from arlon.shapes import captions, oracle, world
from arlon.shapes.oracle import Reading
from arlon.shapes.prompt_reader import AskedObject, AskedShot, read_prompt

PROMPT_ATTRIBUTES = ("colour", "shape", "size", "motion", "direction", "speed", "background", "count")
"""`direction` is the motion of objects asked to move left, right, up or down; `count` that of the objects seen."""
GUESS: Mapping[str, float] = {
    "colour": 1 / len(world.COLOURS),
    "shape": 1 / len(world.SHAPES),
    "size": 1 / len(world.SIZES),
    "motion": 1 / len(world.MOTIONS),
    "direction": 1 / len(world.TRANSLATION),
    "speed": 1 / len(world.SPEEDS),
    "background": 1 / len(world.BACKGROUNDS),
}
"""Chance of a uniform guess among the values an attribute has."""
CHANGES = ("colour", "motion", "speed")
"""Attributes that a prompt switch may change."""
LASTING = ("colour", "shape", "background", "motion")
"""Attributes that must stay when another changes."""
MAX_DRAWN = 2**20
"""Values that a bootstrap draws at a time; the interval does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A take to make: `prompts[i]` describes `scene.shots[i]`."""

    scene: world.Scene
    prompts: tuple[str, ...]
    seed: int
    """Seed of the film."""

    @property
    def changed(self) -> str | None:
        """The attribute that the second prompt changes; None without a second prompt."""
        if len(self.prompts) < 2:
            return None
        before, after = (shot.objects[0] for shot in self.scene.shots[:2])
        return next(name for name in CHANGES if getattr(before, name) != getattr(after, name))


def sample_cases(
    count: int,
    *,
    seconds: Sequence[float],
    split: world.Split = "held_out",
    seed: int = 0,
    two_objects_prob: float = 0.0,
    aspect: float = 1.0,
) -> list[Case]:
    """Draw cases. Case i depends on (seed, number of shots, i) only, so a longer suite begins with a shorter one.

    Args:
        count: Cases.
        seconds: Length of each shot.
        split: `held_out`: attribute pairs and phrasings never trained on; `train`: those of the training.
        seed: Of the suite.
        two_objects_prob: Share of cases with two objects; only for cases of one shot.
        aspect: Frame width over height.

    Returns:
        Cases whose prompts state every attribute.

    Raises:
        ValueError: If there is no shot, or cases of several shots are to have two objects.
    """
    if not seconds:
        raise ValueError("a case needs at least one shot: give its length in seconds")
    if len(seconds) > 1 and two_objects_prob:
        raise ValueError(f"a prompt switch is scored on one object: two_objects_prob must be 0, got {two_objects_prob}")
    cases = []
    for index in range(count):
        rng = np.random.default_rng([seed, len(seconds), index])
        scene = _sample_scene(rng, seconds, split, two_objects_prob, aspect)
        prompts = tuple(_full_caption(shot, rng, split) for shot in scene.shots)
        cases.append(Case(scene=scene, prompts=prompts, seed=int(rng.integers(2**31))))
    return cases


def _sample_scene(
    rng: np.random.Generator, seconds: Sequence[float], split: world.Split, two_objects_prob: float, aspect: float
) -> world.Scene:
    """Draw a scene in which no object grows, or shrinks, in two consecutive shots: it would reach the size limits."""
    while True:
        scene = world.sample_scene(rng, seconds=seconds, split=split, two_objects_prob=two_objects_prob, aspect=aspect)
        motions = [shot.objects[0].motion for shot in scene.shots]
        if not any(before == after and after in ("grow", "shrink") for before, after in pairwise(motions)):
            return scene


def _full_caption(shot: world.Shot, rng: np.random.Generator, split: world.Split) -> str:
    """A caption that leaves nothing out. Held-out captions never do; others are drawn until one does not."""
    while True:
        text = captions.caption(shot, rng, split)
        if split == "held_out" or _states_all(text):
            return text


def _states_all(text: str) -> bool:
    """Whether a training caption states the background, and size and speed of every object."""
    asked = read_prompt(text)
    assert asked is not None
    return asked.background is not None and all(o.size and (o.speed or o.motion == "still") for o in asked.objects)


def render_case(case: Case, *, height: int, width: int, fps: float) -> list[np.ndarray]:
    """Frames (F, pH, pW, 3) uint8 of every shot as they should be."""
    ends = [round(end * fps) for end in np.cumsum([shot.seconds for shot in case.scene.shots])]
    frames = world.render_scene(case.scene, height=height, width=width, fps=fps, num_frames=ends[-1]).frames
    return np.split(frames, ends[:-1])


# --- one prompt ----------------------------------------------------------------------------------------------


def score_prompt(reading: Reading, shot: world.Shot | AskedShot) -> dict[str, float]:
    """Share of what a prompt asks for that is there, by attribute.

    Returns:
        A value for each of `PROMPT_ATTRIBUTES`: the share of the objects asked for of which it is right. An object
        that is not there has nothing right. NaN: not asked for, no object moves in a direction, or none has a speed.
    """
    score = oracle.score_clip(reading, shot)
    looks: Sequence[world.ObjectLook | AskedObject] = shot.objects
    directed = [o.motion for o, look in zip(score.objects, looks, strict=True) if look.motion in world.TRANSLATION]
    values = {name: score.share(name) for name in oracle.ATTRIBUTES}
    values |= {
        "direction": sum(map(bool, directed)) / len(directed) if directed else math.nan,
        "background": math.nan if score.background is None else float(score.background),
        "count": float(score.count),
    }
    return {name: values[name] for name in PROMPT_ATTRIBUTES}


def score_both(reading: Reading, shot: world.Shot | AskedShot) -> dict[str, float]:
    """Whether all objects are right if two or more are asked for; NaN for a single one.

    Returns:
        `both colours`: each is there in its colour. `both objects`: each is there in its colour and its shape.
    """
    if len(shot.objects) < 2:
        return {"both colours": math.nan, "both objects": math.nan}
    objects = oracle.score_clip(reading, shot).objects
    return {
        "both colours": float(all(o.colour for o in objects)),
        "both objects": float(all(o.colour and o.shape for o in objects)),
    }


def shuffled_scores(readings: Sequence[Reading], shots: Sequence[world.Shot]) -> dict[str, float]:
    """Scores of readings against the prompts of all other cases: the level of chance for this model and these prompts.

    Only pairs of cases that both ask for an attribute count, so that clips of a spinning object do not lower the
    chance of `direction`.

    Returns:
        A mean for each of `PROMPT_ATTRIBUTES`; NaN if there is no such pair.

    Raises:
        ValueError: If there are not as many readings as shots.
    """
    if len(readings) != len(shots):
        raise ValueError(f"expected one reading a shot, got {len(readings)} readings and {len(shots)} shots")
    table = {name: np.full((len(shots), len(shots)), math.nan) for name in PROMPT_ATTRIBUTES}
    for row, reading in enumerate(readings):
        for column, shot in enumerate(shots):
            for name, value in score_prompt(reading, shot).items():
                table[name][row, column] = value
    return {name: _mean_off_diagonal(values) for name, values in table.items()}


def _mean_off_diagonal(values: np.ndarray) -> float:
    asked = np.isfinite(values.diagonal())
    pairs = values[np.ix_(asked, asked)]
    others = pairs[~np.eye(len(pairs), dtype=bool)]
    return float(others.mean()) if others.size else math.nan


# --- a prompt switch -----------------------------------------------------------------------------------------


def score_switch(before: Reading, after: Reading, case: Case) -> dict[str, float]:
    """Effect of a prompt switch, from the readings of the shots before and after it.

    Returns:
        Values 0 or 1, NaN if they do not apply to this case:

        `appears`: the second shot shows the new value of the attribute that changes; also by what changes,
            `appears colour`, `appears motion`, `appears speed`.
        `told NAME`, for what does not change of `LASTING`: the second shot shows what its prompt says.
        `kept NAME`, likewise: the second shot shows what the *first* shot showed, whether that was asked for or
            not. Objects are matched by their place at the join (`oracle.identity_kept`); motion is that of the
            most visible object.
        `join place`, `join size`: at the join the object is where it was, and as large.

    Raises:
        ValueError: If the case has no prompt switch.
    """
    changed = case.changed
    if changed is None:
        raise ValueError("the case has one shot only: a prompt switch needs two")
    told = score_prompt(after, case.scene.shots[1])
    kept = _kept(before, after)
    values = {"appears": told[changed]}
    values |= {f"appears {name}": told[name] if name == changed else math.nan for name in CHANGES}
    for kind, found in (("told", told), ("kept", kept)):
        values |= {f"{kind} {name}": math.nan if name == changed else found[name] for name in LASTING}
    return values | {f"join {name}": kept[name] for name in ("place", "size")}


def _kept(before: Reading, after: Reading) -> dict[str, float]:
    """Attributes that the most visible object kept; empty if there was no object."""
    identity = oracle.identity_kept(before, after)
    names = ("place", "colour", "shape", "size")
    kept = {name: float(getattr(identity.objects[0], name)) if identity.objects else 0.0 for name in names}
    motions = [reading.objects[0].motion if reading.objects else None for reading in (before, after)]
    same_motion = motions[0] is not None and motions[0] == motions[1]
    return kept | {"background": float(identity.background), "motion": float(same_motion)}


# --- figures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Result of a case: readings of its shots, as made and as they should be, and the figures of both."""

    case: Case
    readings: tuple[Reading, ...]
    truth: tuple[Reading, ...]
    scores: dict[str, float]
    truth_scores: dict[str, float]


def judge(case: Case, shots: Sequence[np.ndarray], *, fps: float) -> Outcome:
    """Read and score the frames (F, pH, pW, 3) uint8 of every shot of a case.

    Raises:
        ValueError: If there are not as many shots as prompts.
    """
    if len(shots) != len(case.prompts):
        raise ValueError(f"the case has {len(case.prompts)} prompts, got frames of {len(shots)} shots")
    height, width = shots[0].shape[1:3]
    ideal = render_case(case, height=height, width=width, fps=fps)
    readings, truth = (tuple(oracle.read_clip(frames, fps=fps) for frames in kind) for kind in (shots, ideal))
    return Outcome(case, readings, truth, score_case(case, readings), score_case(case, truth))


def score_case(case: Case, readings: Sequence[Reading]) -> dict[str, float]:
    """Figures of a case: those of a prompt and those of two objects, or those of a prompt switch."""
    if case.changed is None:
        return score_prompt(readings[0], case.scene.shots[0]) | score_both(readings[0], case.scene.shots[0])
    return score_switch(readings[0], readings[1], case)


@dataclass(frozen=True)
class Share:
    """Mean over cases, with its interval; NaN and a count of 0 if no case has a value."""

    mean: float
    low: float
    high: float
    count: int
    """Cases that have a value."""


@dataclass(frozen=True)
class Row:
    """A figure of a suite with its points of comparison; NaN if a comparison does not apply."""

    right: Share
    guess: float
    """Chance of a uniform guess."""
    shuffled: float
    """Score against the prompts of the other cases; see `shuffled_scores`."""
    truth: float
    """Mean of the scenes rendered as asked."""


def tabulate(outcomes: Sequence[Outcome]) -> dict[str, Row]:
    """Every figure of a suite, by name. All cases have the same number of shots; several have no `shuffled`.

    Raises:
        ValueError: If there is no case.
    """
    right = summarise([outcome.scores for outcome in outcomes])
    truth = summarise([outcome.truth_scores for outcome in outcomes])
    shuffled: dict[str, float] = {}
    if outcomes[0].case.changed is None:
        shots = [outcome.case.scene.shots[0] for outcome in outcomes]
        shuffled = shuffled_scores([outcome.readings[0] for outcome in outcomes], shots)
    return {
        name: Row(share, _guess(name), shuffled.get(name, math.nan), truth[name].mean) for name, share in right.items()
    }


def _guess(name: str) -> float:
    """Level of chance of a figure such as `colour` or `told colour`; NaN if guessing does not apply."""
    return math.nan if name.startswith(("kept", "join")) else GUESS.get(name.split()[-1], math.nan)


def summarise(scores: Sequence[Mapping[str, float]], *, level: float = 0.95, seed: int = 0) -> dict[str, Share]:
    """Mean and bootstrap interval of every figure over cases.

    Args:
        scores: The figures of each case, all with the same names.
        level: Probability that the interval is to hold.
        seed: Of the resampling.

    Raises:
        ValueError: If there is no case.
    """
    if not scores:
        raise ValueError("there are no cases to summarise")
    shares = {}
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        values = values[np.isfinite(values)]
        low, high = bootstrap_interval(values, level=level, seed=seed)
        shares[name] = Share(float(values.mean()) if len(values) else math.nan, low, high, len(values))
    return shares


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, section 13.3).

    Args:
        values: One a case, (n,).
        level: Probability that the interval is to hold, (0, 1).
        num_resamples: Draws of n cases with replacement.
        seed: Of the draws.

    Returns:
        Lower and upper end; both NaN without values. Equal values have an interval of length 0.

    Raises:
        ValueError: If `level` is not a probability.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if not len(values):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(1, MAX_DRAWN // len(values))
    sizes = [min(rows, num_resamples - done) for done in range(0, num_resamples, rows)]
    means = np.concatenate([values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
