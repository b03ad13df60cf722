"""Shapes world: a procedurally rendered world whose truth is known exactly.

Anti-aliased objects on simple backgrounds move, and change when the prompt changes. A `Scene` is a row of `Shot`s; the
objects keep place, size and angle from one shot to the next and take on the new shot's colour, motion and speed.

Lengths are in units of the frame height, times in seconds, so a scene renders at any size, frame rate and length. The
world is a torus: what leaves the frame on one side comes back on the other, so no motion ever ends.

Dimension key: F frames, O objects, pH pW pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from arlon.errors import did_you_mean

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "green": (52, 200, 76),
    "blue": (48, 92, 240),
    "yellow": (246, 226, 48),
    "purple": (158, 60, 200),
    "orange": (248, 136, 24),
    "cyan": (56, 216, 226),
    "white": (246, 246, 246),
}
MORE_COLOURS: dict[str, tuple[int, int, int]] = {
    "pink": (250, 148, 190),
    "magenta": (224, 28, 190),
    "teal": (20, 136, 128),
    "brown": (124, 72, 28),
    "lime": (172, 244, 44),
    "lavender": (184, 160, 244),
    "coral": (252, 112, 92),
    "mint": (152, 246, 190),
}
"""Colours that prompts of the evaluation never name: a model learns from them that colour and shape are two things."""
PALETTE = COLOURS | MORE_COLOURS
SHAPES = ("circle", "square", "triangle", "star")
MORE_SHAPES = ("ring", "cross", "bar", "diamond", "semicircle", "crescent")
"""Shapes that prompts of the evaluation never name, for the same reason."""
ALL_SHAPES = SHAPES + MORE_SHAPES
SIZES: dict[str, float] = {"small": 0.11, "large": 0.18}
MOTIONS = ("left", "right", "up", "down", "bounce", "circle", "still", "grow", "shrink", "spin")
SPEEDS = ("slow", "fast")
BACKGROUNDS = ("black", "grey", "navy", "grass", "sand", "sky")

HELD_OUT_COLOUR_SHAPE = frozenset(
    {("red", "star"), ("cyan", "triangle"), ("yellow", "square"), ("purple", "circle"), ("white", "star")}
)
HELD_OUT_COLOUR_MOTION = frozenset({("green", "right"), ("orange", "up"), ("blue", "bounce")})

TRANSLATION = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MOVE_SPEED = {"slow": 0.09, "fast": 0.22}
"""Heights a second, for left, right, up, down."""
CIRCLE_PERIOD = {"slow": 5.0, "fast": 2.5}
BOUNCE_PERIOD = {"slow": 2.4, "fast": 1.2}
SPIN_RATE = {"slow": 1.3, "fast": 2.6}
"""Radians a second."""
GROW_RATE = {"slow": 0.012, "fast": 0.028}
"""Change of radius, heights a second."""
RADIUS_LIMITS = (0.06, 0.27)
CIRCLE_RADIUS = 0.14
BOUNCE_HEIGHT = 0.24

Split = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class ObjectLook:
    """Attributes and motion of an object during a shot. All fields are names from this module's vocabularies."""

    colour: str
    shape: str
    size: str
    motion: str
    speed: str


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot: its objects (the same ones, in the same order, as in the shot before), background and length."""

    objects: tuple[ObjectLook, ...]
    background: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Shots without a cut between them, and the start of each object: (x, y) in heights from the top left."""

    shots: tuple[Shot, ...]
    start: tuple[tuple[float, float], ...]
    phase: tuple[float, ...]
    """Phase in radians at which a circling or bouncing object starts, one per object."""


@dataclass(frozen=True)
class Rendered:
    """A rendered scene and its truth.

    frames: (F, pH, pW, 3) uint8. shot: (F,) index of the shot of each frame. x, y: (F, O) in heights, wrapped into the
    frame; radius: (F, O) in heights; angle: (F, O) in radians.
    """

    frames: np.ndarray
    shot: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


# --- sampling scenes -------------------------------------------------------------------------------------------------


def is_held_out(look: ObjectLook) -> bool:
    """True if the look has an attribute pair that training never shows."""
    return (look.colour, look.shape) in HELD_OUT_COLOUR_SHAPE or (
        look.colour,
        look.motion,
    ) in HELD_OUT_COLOUR_MOTION


def is_possible(look: ObjectLook) -> bool:
    """False for looks that cannot be seen: a circle does not visibly spin."""
    return not (look.shape in {"circle", "ring"} and look.motion == "spin")


def sample_look(
    rng: np.random.Generator,
    split: Split,
    *,
    motions: Sequence[str] = MOTIONS,
    colours: Sequence[str] = tuple(COLOURS),
    shapes: Sequence[str] = SHAPES,
) -> ObjectLook:
    """Draw a look; `train` never has a held-out pair, `held_out` always has one."""
    while True:
        look = ObjectLook(
            colour=str(rng.choice(list(colours))),
            shape=str(rng.choice(shapes)),
            size=str(rng.choice(list(SIZES))),
            motion=str(rng.choice(motions)),
            speed=str(rng.choice(SPEEDS)),
        )
        if is_possible(look) and is_held_out(look) == (split == "held_out"):
            return look


def change_look(
    rng: np.random.Generator, look: ObjectLook, split: Split, *, colours: Sequence[str] = tuple(COLOURS)
) -> ObjectLook:
    """Change colour, motion or speed, as a prompt switch does; shape and size stay."""
    while True:
        kind = rng.choice(("colour", "motion", "motion", "speed"))
        if kind == "colour":
            new = replace(look, colour=str(rng.choice(list(colours))))
        elif kind == "motion":
            new = replace(look, motion=str(rng.choice(MOTIONS)))
        else:
            new = replace(look, speed="fast" if look.speed == "slow" else "slow")
        if look.motion == "still" and new.motion == "still" and kind == "speed":
            continue
        if new != look and is_possible(new) and (split == "held_out" or not is_held_out(new)):
            return new


def sample_scene(
    rng: np.random.Generator,
    *,
    seconds: Sequence[float],
    split: Split = "train",
    two_objects_prob: float = 0.3,
    aspect: float = 1.0,
    colours: Sequence[str] = tuple(COLOURS),
    shapes: Sequence[str] = SHAPES,
) -> Scene:
    """Draw a scene of `len(seconds)` shots; every shot after the first changes one attribute of one object.

    Args:
        rng: Source of all randomness.
        seconds: Length of each shot.
        split: Which attribute pairs may occur (see `sample_look`).
        two_objects_prob: Share of scenes with two objects. Their colours differ and their lanes are apart.
        aspect: Frame width over height.
        colours: Names of `PALETTE` that objects have.
        shapes: Names of `ALL_SHAPES` that objects have.
    """
    looks = [sample_look(rng, split, colours=colours, shapes=shapes)]
    if rng.random() < two_objects_prob:
        looks.append(_sample_second(rng, looks[0], split, colours, shapes))
    background = str(rng.choice(BACKGROUNDS))
    shots = [Shot(objects=tuple(looks), background=background, seconds=seconds[0])]
    for length in seconds[1:]:
        looks = list(shots[-1].objects)
        which = int(rng.integers(len(looks)))
        looks[which] = _change_apart(rng, looks, which, split, colours)
        shots.append(Shot(objects=tuple(looks), background=background, seconds=length))
    return Scene(
        shots=tuple(shots),
        start=_sample_start(rng, shots[0].objects, aspect),
        phase=tuple(float(v) for v in rng.uniform(0, 2 * np.pi, len(looks))),
    )


def _sample_second(
    rng: np.random.Generator, first: ObjectLook, split: Split, colours: Sequence[str], shapes: Sequence[str]
) -> ObjectLook:
    while True:
        chosen: Split = "train" if split == "train" or rng.random() < 0.5 else split
        look = sample_look(rng, chosen, colours=colours, shapes=shapes)
        if look.colour != first.colour and not _paths_cross(first.motion, look.motion):
            return look


def _change_apart(
    rng: np.random.Generator, looks: list[ObjectLook], which: int, split: Split, colours: Sequence[str]
) -> ObjectLook:
    """Change one object without taking the other's colour or crossing its lane."""
    for _ in range(64):
        new = change_look(rng, looks[which], split, colours=colours)
        others = [look for i, look in enumerate(looks) if i != which]
        if all(new.colour != o.colour for o in others) and (not others or new.motion == looks[which].motion):
            return new
    return looks[which]


def _paths_cross(a: str, b: str) -> bool:
    horizontal, vertical = {"left", "right"}, {"up", "down", "bounce"}
    return (a in horizontal and b in vertical) or (a in vertical and b in horizontal)


def _sample_start(
    rng: np.random.Generator, looks: Sequence[ObjectLook], aspect: float
) -> tuple[tuple[float, float], ...]:
    """One object anywhere; two objects in lanes of their own, across the direction they move in."""
    if len(looks) == 1:
        return ((float(rng.uniform(0.15, 0.85) * aspect), float(rng.uniform(0.15, 0.85))),)
    lanes = [0.26 + float(rng.uniform(-0.03, 0.03)), 0.74 + float(rng.uniform(-0.03, 0.03))]
    if rng.random() < 0.5:
        lanes.reverse()
    along = [float(rng.uniform(0.2, 0.8)) for _ in looks]
    if any(look.motion in {"up", "down", "bounce"} for look in looks):
        return tuple((lane * aspect, a) for lane, a in zip(lanes, along, strict=True))
    return tuple((a * aspect, lane) for lane, a in zip(lanes, along, strict=True))


# --- motion ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paths:
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def _advance(look: ObjectLook, x: float, y: float, r: float, a: float, phase: float, time_s: np.ndarray) -> _Paths:
    """Path of one object during one shot, at times (F,) since the shot began, from the state the last shot left."""
    n = np.ones_like(time_s)
    xs, ys, radius, angle = x * n, y * n, r * n, a * n
    if look.motion in TRANSLATION:
        dx, dy = TRANSLATION[look.motion]
        xs, ys = xs + dx * MOVE_SPEED[look.speed] * time_s, ys + dy * MOVE_SPEED[look.speed] * time_s
    elif look.motion == "circle":
        turn = phase + 2 * np.pi * time_s / CIRCLE_PERIOD[look.speed]
        xs = xs + CIRCLE_RADIUS * (np.cos(turn) - np.cos(phase))
        ys = ys + CIRCLE_RADIUS * (np.sin(turn) - np.sin(phase))
    elif look.motion == "bounce":
        ys = ys - BOUNCE_HEIGHT * np.abs(np.sin(np.pi * time_s / BOUNCE_PERIOD[look.speed]))
    elif look.motion in ("grow", "shrink"):
        sign = 1.0 if look.motion == "grow" else -1.0
        low, high = min(RADIUS_LIMITS[0], r), max(RADIUS_LIMITS[1], r)
        radius = np.clip(radius + sign * GROW_RATE[look.speed] * time_s, low, high)
    elif look.motion == "spin":
        angle = angle + SPIN_RATE[look.speed] * time_s
    return _Paths(xs, ys, radius, angle)


def trace(scene: Scene, times_s: np.ndarray, aspect: float = 1.0) -> tuple[np.ndarray, _Paths]:
    """Shot index (F,) and paths (F, O) of all objects at times (F,) in seconds from the start of the scene."""
    ends = np.cumsum([shot.seconds for shot in scene.shots])
    shot_of = np.minimum(np.searchsorted(ends, times_s + 1e-9, side="right"), len(ends) - 1)
    paths: list[_Paths] = []
    for index, (x, y) in enumerate(scene.start):
        r, a, phase = SIZES[scene.shots[0].objects[index].size], 0.0, scene.phase[index]
        columns = []
        for number, shot in enumerate(scene.shots):
            begin = ends[number] - shot.seconds
            local = np.append(times_s[shot_of == number] - begin, shot.seconds)
            part = _advance(shot.objects[index], x, y, r, a, phase, local)
            columns.append(_Paths(part.x[:-1], part.y[:-1], part.radius[:-1], part.angle[:-1]))
            x, y, r, a = (float(v[-1]) for v in (part.x, part.y, part.radius, part.angle))
            if shot.objects[index].motion == "circle":
                phase += 2 * np.pi * shot.seconds / CIRCLE_PERIOD[shot.objects[index].speed]
        paths.append(_Paths(*(np.concatenate([getattr(c, f) for c in columns]) for f in ("x", "y", "radius", "angle"))))
    stack = {f: np.stack([getattr(p, f) for p in paths], axis=1) for f in ("x", "y", "radius", "angle")}
    return shot_of, _Paths(np.mod(stack["x"], aspect), np.mod(stack["y"], 1.0), stack["radius"], stack["angle"])


# --- pixels ----------------------------------------------------------------------------------------------------------


def render_background(name: str, height: int, width: int) -> np.ndarray:
    """Background (pH, pW, 3) as float32 in [0, 255]. Fixed for a name and a size."""
    y = ((np.arange(height) + 0.5) / height)[:, None].astype(np.float32)
    x = ((np.arange(width) + 0.5) / height)[None, :].astype(np.float32)
    if name == "grass":
        blades = np.sin(2 * np.pi * (5 * x + 0.6 * np.sin(2 * np.pi * 2 * y)))
        layers = (34 + 6 * blades + 8 * y, 82 + 12 * blades + 14 * y, 26 + 4 * blades + 0 * y)
    elif name == "sand":
        ripples = np.sin(2 * np.pi * (4 * y + 0.35 * np.sin(2 * np.pi * 1.5 * x)))
        layers = (184 + 8 * ripples, 158 + 8 * ripples, 112 + 7 * ripples)
    elif name == "sky":
        layers = (96 + 52 * y + 0 * x, 146 + 42 * y + 0 * x, 196 + 22 * y + 0 * x)
    else:
        flat = {"black": (10, 10, 12), "grey": (104, 104, 106), "navy": (16, 22, 72)}
        if name not in flat:
            raise ValueError(f"unknown background {name!r}, {did_you_mean(name, BACKGROUNDS)}")
        red, green, blue = (np.float32(level) + 0 * x * y for level in flat[name])
        layers = (red, green, blue)
    return np.stack(np.broadcast_arrays(*layers), axis=-1).astype(np.float32)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | np.float64) -> np.ndarray:
    """Distance to the outline, negative inside, of a shape of about the area of a disc of `radius`; y points down."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius
    if shape == "triangle":
        inner = 0.78 * radius
        return np.maximum(0.8660254 * np.abs(x) - 0.5 * y, y) - inner
    if shape == "star":
        fold = np.pi / 5
        turn = np.arctan2(np.abs(x), -y)
        turn = np.abs(np.mod(turn + fold, 2 * fold) - fold)
        length = np.sqrt(x * x + y * y)
        u, v = length * np.cos(turn), length * np.sin(turn)
        tip, notch = 1.5 * radius, 0.68 * radius
        ex, ey = notch * np.cos(fold) - tip, notch * np.sin(fold)
        return (ey * (u - tip) - ex * v) / np.sqrt(ex * ex + ey * ey)
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.92 * radius) - 0.27 * radius
    if shape == "cross":
        long, wide = 1.2 * radius, 0.42 * radius
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(ax - long, ay - wide), np.maximum(ax - wide, ay - long))
    if shape == "bar":
        return np.maximum(np.abs(x) - 1.4 * radius, np.abs(y) - 0.56 * radius)
    if shape == "diamond":
        return 0.8660254 * np.abs(x) + 0.5 * np.abs(y) - 0.825 * radius
    if shape == "semicircle":
        below = y - 0.6 * radius
        return np.maximum(np.sqrt(x * x + below * below) - 1.414 * radius, below)
    if shape == "crescent":
        inside, bite = x + 0.2 * radius, x - 0.55 * radius
        return np.maximum(np.sqrt(inside * inside + y * y) - 1.3 * radius, radius - np.sqrt(bite * bite + y * y))
    raise ValueError(f"unknown shape {shape!r}, {did_you_mean(shape, ALL_SHAPES)}")


def render_scene(
    scene: Scene, *, height: int = 64, width: int = 64, fps: float = 8.0, num_frames: int | None = None
) -> Rendered:
    """Render a scene; `num_frames` defaults to its whole length. Later objects are in front of earlier ones."""
    if num_frames is None:
        num_frames = round(sum(shot.seconds for shot in scene.shots) * fps)
    aspect = width / height
    shot_of, paths = trace(scene, np.arange(num_frames) / fps, aspect)
    ys = ((np.arange(height) + 0.5) / height).astype(np.float32)[None, :, None]
    xs = ((np.arange(width) + 0.5) / height).astype(np.float32)[None, None, :]
    frames = np.empty((num_frames, height, width, 3), np.float32)
    for number, shot in enumerate(scene.shots):
        chosen = np.flatnonzero(shot_of == number)
        if not len(chosen):
            continue
        picture = np.broadcast_to(render_background(shot.background, height, width), (len(chosen), height, width, 3))
        for index, look in enumerate(shot.objects):
            x, y, r, a = (
                v[chosen, index].astype(np.float32)[:, None, None]
                for v in (paths.x, paths.y, paths.radius, paths.angle)
            )
            dx = np.mod(xs - x + aspect / 2, aspect) - aspect / 2
            dy = np.mod(ys - y + 0.5, 1.0) - 0.5
            if np.any(a):
                cos, sin = np.cos(a), np.sin(a)
                dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
            cover = np.clip(0.5 - signed_distance(look.shape, dx, dy, r) * height, 0, 1)[..., None]
            picture = picture + cover * (np.asarray(PALETTE[look.colour], np.float32) - picture)
        frames[chosen] = picture
    pixels = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
    return Rendered(pixels, shot_of, paths.x, paths.y, paths.radius, paths.angle)
