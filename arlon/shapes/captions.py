"""Captions of the shapes world: a grammar with several phrasings of each fact.

Every caption states colour, shape and motion of each object; size, speed and background are often left out, as people
do. The phrasings in `HELD_OUT` are never used for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from arlon.shapes.world import ObjectLook, Shot, Split

Phrases = Mapping[str, Sequence[str]]

MOTION_PHRASES: Phrases = {
    "left": (
        *("moves left", "drifts to the left", "slides left", "travels to the left side", "goes left", "floats left"),
        *("shifts leftward", "flies to the left", "moves from right to left", "wanders off to the left"),
    ),
    "right": (
        *("moves right", "drifts to the right", "slides right", "travels to the right side", "goes right"),
        *("floats right", "shifts rightward", "flies to the right", "moves from left to right"),
        "wanders off to the right",
    ),
    "up": (
        *("moves up", "rises", "floats upward", "travels to the top", "goes up", "ascends", "flies up into the air"),
        *("soars", "moves from bottom to top", "lifts off"),
    ),
    "down": (
        *("moves down", "falls", "sinks downward", "travels to the bottom", "goes down", "descends", "comes down"),
        *("plunges", "moves from top to bottom", "sinks"),
    ),
    "bounce": (
        *("bounces", "bounces up and down", "hops up and down", "jumps again and again", "is bouncing"),
        *("jumps up and down", "leaps up and down", "hops on the spot", "springs up and down"),
    ),
    "circle": (
        *("moves in a circle", "circles around", "goes round in circles", "orbits in a ring", "is circling"),
        *("runs in circles", "revolves around a point", "follows a round path", "flies in a loop"),
    ),
    "still": (
        *("stays still", "does not move", "rests in place", "stands motionless", "is not moving", "holds still"),
        *("sits still", "stays where it is", "is at rest"),
    ),
    "grow": (
        *("grows", "gets bigger", "becomes larger and larger", "expands", "is growing", "gets larger and larger"),
        *("swells", "increases in size", "becomes bigger and bigger"),
    ),
    "shrink": (
        *("shrinks", "gets smaller", "becomes smaller and smaller", "contracts", "is shrinking", "shrinks down"),
        *("gets smaller and smaller", "decreases in size", "dwindles"),
    ),
    "spin": (
        *("spins", "rotates in place", "turns around itself", "spins around its centre", "is spinning", "rotates"),
        *("turns on the spot", "whirls in place", "revolves on its own axis", "twirls"),
    ),
}
HELD_OUT_MOTION_PHRASES: Phrases = {
    "left": ("heads left", "glides toward the left"),
    "right": ("heads right", "glides toward the right"),
    "up": ("heads up", "climbs upward"),
    "down": ("heads down", "drops downward"),
    "bounce": ("keeps bouncing",),
    "circle": ("travels around in a circle",),
    "still": ("remains still",),
    "grow": ("keeps growing bigger",),
    "shrink": ("keeps shrinking smaller",),
    "spin": ("keeps spinning around",),
}
SPEED_PHRASES: Phrases = {
    "slow": ("slowly", "at a slow pace", "at low speed", "very slowly", "without hurry"),
    "fast": ("quickly", "fast", "at high speed", "at a fast pace", "very fast", "swiftly"),
}
HELD_OUT_SPEED_PHRASES: Phrases = {"slow": ("in slow motion",), "fast": ("rapidly",)}
SIZE_PHRASES: Phrases = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
BACKGROUND_PHRASES: Phrases = {
    "black": ("on a black background", "in front of black", "on black", "with a black background"),
    "grey": ("on a grey background", "in front of a grey wall", "on grey", "with a grey background"),
    "navy": ("on a navy background", "in front of dark blue", "on navy", "with a navy background"),
    "grass": ("on green grass", "over a grass field", "on grass", "with grass behind"),
    "sand": ("on sand", "over a sandy beach", "on a sandy ground", "with sand behind"),
    "sky": ("in the sky", "in front of a blue sky", "high in the sky", "with the sky behind"),
}
HELD_OUT_BACKGROUND_PHRASES: Phrases = {
    "black": ("against a black background",),
    "grey": ("against a grey background",),
    "navy": ("against a navy background",),
    "grass": ("against a grass background",),
    "sand": ("against a sand background",),
    "sky": ("against a sky background",),
}
TEMPLATES = (
    "{objects} {background}",
    "{background}, {objects}",
    "{objects}",
    "a video of {objects} {background}",
    "a clip of {objects} {background}",
    "this video shows {objects} {background}",
    "{objects}, {background}",
)
HELD_OUT_TEMPLATES = ("{objects}, seen {background}", "we see {objects} {background}")
STATED_PROB = 0.75
"""Chance that size, speed or background is stated in a training caption."""


def caption(shot: Shot, rng: np.random.Generator, split: Split = "train") -> str:
    """Describe a shot; `held_out` states every fact, and motion, speed and background in held-out phrasings only."""
    held_out = split == "held_out"
    objects = " and ".join(_object(look, rng, held_out) for look in shot.objects)
    stated = held_out or rng.random() < STATED_PROB
    phrases = HELD_OUT_BACKGROUND_PHRASES if held_out else BACKGROUND_PHRASES
    background = _pick(rng, phrases[shot.background])
    templates = HELD_OUT_TEMPLATES if held_out else TEMPLATES
    if not stated:
        return objects
    return _pick(rng, templates).format(objects=objects, background=background)


def _object(look: ObjectLook, rng: np.random.Generator, held_out: bool) -> str:
    size = _pick(rng, SIZE_PHRASES[look.size])
    motion = _pick(rng, (HELD_OUT_MOTION_PHRASES if held_out else MOTION_PHRASES)[look.motion])
    speed = _pick(rng, (HELD_OUT_SPEED_PHRASES if held_out else SPEED_PHRASES)[look.speed])
    size_stated, speed_stated = rng.random(2) < (1.0 if held_out else STATED_PROB)
    words = ["a", size if size_stated else "", look.colour, look.shape, motion]
    if speed_stated and look.motion != "still":
        words.append(speed)
    text = " ".join(word for word in words if word)
    return "an" + text[1:] if text[2] in "aeiou" else text


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
