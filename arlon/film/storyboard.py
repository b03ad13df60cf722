"""Storyboards: what a film should show, shot after shot.

A storyboard is a YAML or JSON file:

    seed: 7                    # -1 or absent: a random one, printed and stored
    fps: 8                     # absent film-level values are the model's own
    shots:
      - prompt: a red circle moves left on a black background
        duration: 6            # seconds; "48f" counts frames, "2 segments" what the model makes in one pass
      - prompt: a green circle moves left on a black background
        transition: continue   # carries the last frames over (default); `cut` carries none over

Film-level keys: seed, fps, height, width, model, negative_prompt, guidance_scale, num_inference_steps, solver,
aspect, resolution, use_codes, segment, overlap, aesthetic_score, motion_score, camera_motion, shots.
Shot keys: prompt, duration, transition, blend, seed, guidance_scale, camera_motion, notes, and files that the shot
begins with or ends on: image, video, end_image, or `references` that `mask_strategy` places anywhere in a take (see
`arlon.diffusion.references`). Relative paths start at the storyboard. A plain text file is a storyboard too: a shot per
line, `prompt` or `duration | prompt`; an empty line before a shot is a cut, lines that start with `#` are comments.
Prompts given one by one may use the grammar of Open-Sora (`arlon.text.prompts`) instead of keys.

Reading does not stop at the first problem: one StoryboardError lists all of them, one per line.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from arlon.errors import StoryboardError
from arlon.errors import UsageError as UsageError  # storyboards raise it, so callers find it here too
from arlon.film.storyboard_values import FILM_READERS, SHOT_READERS, Duration, Transition, read_values
from arlon.film.strict_yaml import parse_json, parse_yaml, read_text
from arlon.text.prompts import is_script, parse_prompt

DEFAULT_DURATION = Duration(seconds=5.0)
MAX_SHOTS = 10_000
RANDOM_SEED_LIMIT = 2**31
"""Random seeds lie below it; given ones may be larger (`arlon.film.storyboard_values.MAX_SEED`)."""
FileKey = Literal["image", "end_image", "video"]
REFERENCE_KINDS: tuple[FileKey, ...] = get_args(FileKey)
"""Keys of a shot that name one file; see `arlon.film.media`."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A stretch of film under one prompt."""

    prompt: str
    duration: Duration = DEFAULT_DURATION
    transition: Transition = "continue"
    """How the shot follows the one before: `continue` carries frames over, `cut` carries none over."""
    blend: int | None = None
    """Code frames over which the prompt before passes into this one, after `continue`; None switches at once."""
    seed: int | None = None
    """Seed of the noise of this shot; None: that of the film."""
    guidance_scale: float | None = None
    """Guidance of this shot; None: that of the film."""
    image: str | None = None
    """Picture file that the shot begins with, if it starts a take."""
    end_image: str | None = None
    """Picture file that the shot ends on."""
    video: str | None = None
    """Video file whose end the shot continues from, if it starts a take."""
    references: tuple[str, ...] = ()
    """Picture and video files that `mask_strategy` places in the take that the shot starts."""
    mask_strategy: str = ""
    """Where the `references` go, in the grammar of Open-Sora, with segments counted in the take; if empty, the first
    latent frame of the first reference goes to the head of the take."""
    camera_motion: str | None = None
    """Camera motion added to the prompt; None: that of the film."""
    notes: str = ""
    """Notes for people; they change nothing."""


@dataclass(frozen=True, kw_only=True)
class Storyboard:
    """A film to make. If a value is None, the model decides."""

    shots: tuple[Shot, ...]
    seed: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    model: str | None = None
    negative_prompt: str = ""
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    solver: str | None = None
    aspect: str | None = None
    """Height:width of the frame, such as "9:16", or landscape, portrait, square; instead of `height` and `width`."""
    resolution: str | None = None
    """Size of the frame by name, such as "240p"; None: about as many pixels as the model's own frames have."""
    use_codes: bool | None = None
    """False: the base alone makes the film, without codes, at any frame size. None: with codes if there are any."""
    segment: int | None = None
    """Latent frames that the diffusion transformer makes in one pass, those carried over included."""
    overlap: int | None = None
    """Latent frames carried over from the segment before."""
    aesthetic_score: float | None = None
    """Aesthetic score added to every prompt, in the words of the training captions (6.5 in Open-Sora v1.2); 0: none."""
    motion_score: float | None = None
    """Motion score added likewise; about 5 is calm."""
    camera_motion: str | None = None
    """Camera motion added likewise, such as "pan left"; see `arlon.text.prompts`."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON or YAML, without those that are not set; `parse_storyboard` reads them back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shots"}
        plain = {name: value for name, value in plain.items() if value not in (None, "")}
        plain["shots"] = [_shot_to_plain(shot) for shot in self.shots]
        return plain


@dataclass(frozen=True, kw_only=True)
class ResolvedStoryboard(Storyboard):
    """A film to make, with every value set that the model would otherwise decide.

    Of the other values, None has one meaning whatever the model: no score or camera motion is added to prompts,
    `aspect` and `resolution` have become `height` and `width`, and codes and segments are those of the model geometry.

    Raises:
        StoryboardError: If a value is not set.
    """

    # Without `field()` a value would inherit the default None of the class above.
    seed: int = field()
    fps: float = field()
    height: int = field()
    width: int = field()
    guidance_scale: float = field()
    num_inference_steps: int = field()
    solver: str = field()

    def __post_init__(self) -> None:
        names = ("seed", "fps", "height", "width", "guidance_scale", "num_inference_steps", "solver")
        if unset := [name for name in names if getattr(self, name) is None]:
            raise StoryboardError([f"{', '.join(unset)} must be set in the storyboard of a plan"])

    @classmethod
    def of(cls, storyboard: Storyboard, **values: Any) -> Self:
        """The storyboard with values of the film replaced."""
        return cls(**{f.name: getattr(storyboard, f.name) for f in fields(Storyboard)} | values)

    def seed_of(self, shot: int) -> int:
        """Seed of the noise of a shot: its own, or that of the film."""
        own = self.shots[shot].seed
        return self.seed if own is None else own

    def guidance_scale_of(self, shot: int) -> float:
        """Guidance of a shot: its own, or that of the film."""
        own = self.shots[shot].guidance_scale
        return self.guidance_scale if own is None else own


S = TypeVar("S", bound=Storyboard)


def _shot_to_plain(shot: Shot) -> dict[str, Any]:
    plain = {f.name: getattr(shot, f.name) for f in fields(shot)}
    plain["duration"] = shot.duration.to_plain()
    for kind in REFERENCE_KINDS:  # the file name alone: records must not tell paths of this machine
        plain[kind] = None if plain[kind] is None else Path(plain[kind]).name
    plain["references"] = [Path(path).name for path in shot.references]
    return {name: value for name, value in plain.items() if value not in (None, "", [])}


def random_seed() -> int:
    """Draw a seed in [0, 2^31) from the randomness of the operating system."""
    return secrets.randbelow(RANDOM_SEED_LIMIT)


def load_storyboard(path: str | Path, *, default_duration: Duration | None = None) -> Storyboard:
    """Read a storyboard file: .yaml, .yml, .json, or .txt with one shot a line.

    Args:
        path: The file.
        default_duration: Duration of shots that give none. Default: 5 seconds.

    Raises:
        StoryboardError: If the file is missing, is not a storyboard, or asks for something impossible.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except ValueError as error:
        raise StoryboardError([f"cannot be read: {error}"], f"storyboard '{path}'") from error
    source = f"storyboard '{path}'"
    if path.suffix.lower() == ".txt":
        data: Any = {"shots": _shots_from_text(text)}
    else:
        data = _parse_markup(text, source, is_json=path.suffix.lower() == ".json")
    return anchored(parse_storyboard(data, source=source, default_duration=default_duration), path.parent)


def anchored(storyboard: Storyboard, folder: Path) -> Storyboard:
    """Resolve the relative paths of the files that a storyboard names, which start at `folder`."""
    return replace(storyboard, shots=tuple(_anchored(shot, folder) for shot in storyboard.shots))


def _anchored(shot: Shot, folder: Path) -> Shot:
    """Resolve the relative paths of the files that a shot names, which start at `folder`."""
    files = {kind: name for kind in REFERENCE_KINDS if (name := getattr(shot, kind))}
    paths: dict[str, Any] = {kind: str(folder / Path(name).expanduser()) for kind, name in files.items()}
    return replace(shot, references=tuple(str(folder / Path(name).expanduser()) for name in shot.references), **paths)


def _parse_markup(text: str, source: str, *, is_json: bool) -> Any:
    try:
        return parse_json(text) if is_json else parse_yaml(text)
    except ValueError as error:
        raise StoryboardError([str(error)], source) from error


def _shots_from_text(text: str) -> list[dict[str, str]]:
    shots, is_cut = [], False
    for line in text.splitlines():
        line = line.strip()
        if not line:
            is_cut = True
        elif not line.startswith("#"):
            length = re.fullmatch(r"([\d.][^|]*?)\s*\|\s*(.*)", line)
            shot = {"duration": length[1], "prompt": length[2]} if length else {"prompt": line}
            shots.append(shot | {"transition": "cut" if is_cut else "continue"})
            is_cut = False
    return shots


def parse_storyboard(data: Any, *, source: str = "storyboard", default_duration: Duration | None = None) -> Storyboard:
    """Build a storyboard from plain values (what YAML or JSON gives).

    Args:
        data: A mapping with the film-level keys.
        source: Name of the storyboard, for messages.
        default_duration: Duration of shots that give none. Default: 5 seconds.

    Raises:
        StoryboardError: With every problem found.
    """
    if not isinstance(data, Mapping):
        raise StoryboardError([f"must be a mapping with the key 'shots', got {_kind(data)}"], source)
    problems: list[str] = []
    film = read_values(data, FILM_READERS, problems, also=("shots",))
    shots = _read_shots(data.get("shots"), default_duration, problems)
    if problems:
        raise StoryboardError(problems, source)
    return Storyboard(shots=tuple(shots), **film)


def _read_shots(data: Any, default_duration: Duration | None, problems: list[str]) -> list[Shot]:
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        problems.append("shots must be a list of at least one shot with a prompt: give a prompt")
        return []
    if len(data) > MAX_SHOTS:
        problems.append(f"shots: at most {MAX_SHOTS} shots, got {len(data)}")
        return []
    shots = []
    for index, item in enumerate(data):
        where = f"shots[{index}]"
        item = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping):
            problems.append(f"{where} must be a mapping with the key 'prompt', got {_kind(item)}")
            continue
        values = read_values(item, SHOT_READERS, problems, prefix=f"{where}.")
        if "prompt" not in item:
            problems.append(f"{where}.prompt is missing")
        elif values.get("blend") and values.get("transition") == "cut":
            problems.append(f"{where}.blend needs transition 'continue': behind a cut there is nothing to blend with")
        elif values.get("mask_strategy") and not values.get("references"):
            problems.append(f"{where}.mask_strategy places references: name them in {where}.references")
        elif "prompt" in values:
            shots.append(Shot(**({"duration": default_duration} if default_duration else {}) | values))
    return shots


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def storyboard_from_prompts(
    prompts: Sequence[str], *, duration: Duration | None = None, transition: Transition = "continue"
) -> Storyboard:
    """Make a storyboard of prompts: a shot for each, or several if a prompt names segments in the grammar of Open-Sora.

    Args:
        prompts: At least one.
        duration: Duration of shots whose prompt gives none. Default: 5 seconds.
        transition: How the first shot of a prompt follows the prompt before.

    Raises:
        StoryboardError: If there is no prompt or one cannot be used.
    """
    shots: list[Mapping[str, Any]] = []
    for prompt in prompts:
        try:
            first, *rest = scripted_shots(prompt)
        except ValueError as error:
            raise StoryboardError([str(error)], "prompts") from error
        shots += [{**first, "transition": transition}, *rest]
    return parse_storyboard({"shots": shots}, source="prompts", default_duration=duration)


def scripted_shots(prompt: str) -> list[dict[str, Any]]:
    """Plain values of the shots of a prompt that may use the grammar of Open-Sora; see `arlon.text.prompts`.

    Raises:
        ValueError: If the prompt uses that grammar wrongly.
    """
    if not is_script(prompt):
        return [{"prompt": prompt}]
    script = parse_prompt(prompt)
    starts = [first for first, _ in script.texts]
    shots: list[dict[str, Any]] = [{"prompt": text, "transition": "continue"} for _, text in script.texts]
    for shot, start, stop in zip(shots, starts, starts[1:], strict=False):
        shot["duration"] = Duration(segments=stop - start).to_plain()
    shots[0] |= {"references": list(script.reference_paths), "mask_strategy": script.mask_strategy}
    return shots


def with_overrides(storyboard: S, values: Mapping[str, Any], source: str = "options") -> S:
    """Replace film-level values of a storyboard; a None in `values` leaves the value as it is.

    Raises:
        StoryboardError: If a key is unknown or a value out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    problems: list[str] = []
    film = read_values(given, FILM_READERS, problems)
    if problems:
        raise StoryboardError(problems, source)
    return replace(storyboard, **film)


def with_shot(storyboard: S, index: int, values: Mapping[str, Any]) -> S:
    """Replace values of one shot of a storyboard; a None in `values` leaves the value as it is.

    Args:
        storyboard: The film.
        index: Index of the shot, from 0.
        values: New values by the keys of a shot.

    Raises:
        StoryboardError: If a key is unknown or a value out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    problems: list[str] = []
    read = read_values(given, SHOT_READERS, problems)
    if problems:
        raise StoryboardError(problems, f"shot {index + 1}")
    shots = list(storyboard.shots)
    shots[index] = replace(shots[index], **read)
    return replace(storyboard, shots=tuple(shots))
