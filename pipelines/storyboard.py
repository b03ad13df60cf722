"""Storyboards: what a film should show, shot after shot.

A storyboard is a YAML or JSON file:

    seed: 7                    # -1 or absent: a random one, printed and stored
    fps: 8                     # absent film-level values are the model's own
    shots:
      - prompt: a red circle moves left on a black background
        duration: 6            # seconds; "48f" counts frames, "2 segments" what the model makes in one pass
      - prompt: a green circle moves left on a black background
        transition: continue   # carries the last frames over (default); `cut` starts afresh

Film-level keys: seed, fps, height, width, model, negative_prompt, guidance_scale, num_inference_steps, solver,
aspect, resolution, use_codes, segment, overlap, aesthetic_score, motion_score, camera_motion, shots.
Shot keys: prompt, duration, transition, blend, seed, guidance_scale, camera_motion, notes, and files that the shot
begins with or ends on: image, video, end_image, or `references` that `mask_strategy` places anywhere in a take (see
`arlon.diffusion.references`). Relative paths start at the storyboard. A plain text file is a storyboard too: one shot a
line, `prompt` or `duration | prompt`; an empty line before a shot is a cut, lines that start with `#` are comments.
Prompts given one by one may use the grammar of Open-Sora (`arlon.text.prompts`) instead of keys.

Reading never stops at the first problem: one StoryboardError lists them all, one a line.
"""

from __future__ import annotations

import difflib
import math
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from arlon.text.prompts import add_scores, is_script, parse_prompt
from pipelines.markup import MAX_SHOWN, parse_json, parse_yaml, read_text, shown

Transition = Literal["continue", "cut"]

DEFAULT_DURATION_S = 5.0
MAX_DURATION_S = 3600.0
MAX_DURATION_SEGMENTS = 20_000
MAX_PROMPT_LENGTH = 2000
MAX_SHOTS = 10_000
MAX_BLEND = 64
"""Code frames."""
MAX_SEED = 2**63 - 1
RANDOM_SEED_LIMIT = 2**31
MAX_SIZE = 8192
MAX_FPS = 240.0
MAX_LISTED = 20
"""How many problems a message lists."""
REFERENCE_KINDS = ("image", "end_image", "video")
"""Shot keys that name a file; see `pipelines.references`."""
MAX_SCORE = 100.0
_UNITS = {"f": "frames", "frames": "frames", "segment": "segments", "segments": "segments"}
"""Of a duration, by how they are written; anything else is seconds."""


class UsageError(ValueError):
    """What was asked for cannot be done as asked; nothing has been started."""


class StoryboardError(UsageError):
    """Everything that is wrong with a storyboard, one problem a line.

    Args:
        problems: One sentence a problem.
        source: Name of the storyboard, for the message.
    """

    def __init__(self, problems: Sequence[str], source: str = "storyboard") -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            rest = len(self.problems) - MAX_LISTED
            listed = [*self.problems[:MAX_LISTED], *([f"... and {rest} more"] if rest > 0 else [])]
            lines = "\n".join(f"  {problem}" for problem in listed)
            super().__init__(f"{source} has {len(self.problems)} problems:\n{lines}")


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of time, in seconds, frames or segments: exactly one of them is set."""

    seconds: float | None = None
    frames: int | None = None
    segments: int | None = None

    def num_frames(self, fps: float) -> int:
        """Nearest number of frames at `fps`, at least 1; a length in segments has one on the grid of a model only."""
        return self.frames if self.frames is not None else max(1, round((self.seconds or 0.0) * fps))

    def to_plain(self) -> float | str:
        """The value as it stands in a storyboard file: 4.5, "36f" or "2 segments"."""
        if self.segments is not None:
            return f"{self.segments} segments"
        return f"{self.frames}f" if self.frames is not None else float(self.seconds or 0.0)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A stretch of film under one prompt."""

    prompt: str
    duration: Duration = Duration(seconds=DEFAULT_DURATION_S)
    transition: Transition = "continue"
    """How the shot follows the one before: `continue` carries frames over, `cut` starts afresh."""
    blend: int | None = None
    """Code frames over which the prompt before passes into this one, behind `continue`; None: it is switched."""
    seed: int | None = None
    """Seed of this shot's noise; None: the film's."""
    guidance_scale: float | None = None
    """Guidance of this shot; None: the film's."""
    image: str | None = None
    """Picture file that the shot begins with; it starts a take."""
    end_image: str | None = None
    """Picture file that the shot ends on."""
    video: str | None = None
    """Video file whose end the shot goes on from; it starts a take."""
    references: tuple[str, ...] = ()
    """Picture and video files that `mask_strategy` places in the take that the shot starts."""
    mask_strategy: str = ""
    """Where they go, in the grammar of Open-Sora, segments counted in the take; empty: the first one at the head."""
    camera_motion: str | None = None
    """Said after the prompt; None: the film's."""
    notes: str = ""
    """For the reader; not used."""


@dataclass(frozen=True, kw_only=True)
class Storyboard:
    """A film to make. None means: the model's own value."""

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
    """Height:width of the frame such as "9:16", or landscape, portrait, square; instead of height and width."""
    resolution: str | None = None
    """Size of the frame by name, such as "240p"; None: as many pixels as the model's own."""
    use_codes: bool | None = None
    """False: the base alone makes the film, without codes, at any frame size; None: as the model is."""
    segment: int | None = None
    """Latent frames that the diffusion transformer makes in one pass, those carried over included."""
    overlap: int | None = None
    """Latent frames carried over from the segment before."""
    aesthetic_score: float | None = None
    """Said after every prompt in the words of the training captions (Open-Sora v1.2: 6.5); 0: it is not said."""
    motion_score: float | None = None
    """Likewise; about 5 is calm."""
    camera_motion: str | None = None
    """Likewise, such as "pan left"; see `arlon.text.prompts`."""

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON or YAML, without those that are not set; `parse_storyboard` reads them back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shots"}
        plain = {name: value for name, value in plain.items() if value not in (None, "")}
        plain["shots"] = [_shot_to_plain(shot) for shot in self.shots]
        return plain


def _shot_to_plain(shot: Shot) -> dict[str, Any]:
    plain = {f.name: getattr(shot, f.name) for f in fields(shot)}
    plain["duration"] = shot.duration.to_plain()
    for kind in REFERENCE_KINDS:  # the name alone: where it lies on this machine concerns nobody else
        plain[kind] = None if plain[kind] is None else Path(plain[kind]).name
    plain["references"] = [Path(path).name for path in shot.references]
    return {name: value for name, value in plain.items() if value not in (None, "", [])}


def random_seed() -> int:
    """A fresh seed in [0, 2^31)."""
    return secrets.randbelow(RANDOM_SEED_LIMIT)


def load_storyboard(path: str | Path, *, default_duration: Duration | None = None) -> Storyboard:
    """Read a storyboard file: .yaml, .yml, .json, or .txt with one shot a line.

    Args:
        path: The file.
        default_duration: For shots that give none. Default: 5 seconds.

    Raises:
        StoryboardError: If the file is missing, is not a storyboard, or says something impossible.
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
    """The storyboard with relative paths of its files, which start at a folder, as seen from here."""
    return replace(storyboard, shots=tuple(_anchored(shot, folder) for shot in storyboard.shots))


def _anchored(shot: Shot, folder: Path) -> Shot:
    """The shot with the paths of its files as seen from here."""
    given = {kind: getattr(shot, kind) for kind in REFERENCE_KINDS}
    return replace(
        shot,
        references=tuple(str(folder / Path(name).expanduser()) for name in shot.references),
        **{kind: str(folder / Path(name).expanduser()) for kind, name in given.items() if name},
    )


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
        default_duration: For shots that give none. Default: 5 seconds.

    Raises:
        StoryboardError: With every problem found.
    """
    if not isinstance(data, Mapping):
        raise StoryboardError([f"must be a mapping with the key 'shots', got {_kind(data)}"], source)
    problems: list[str] = []
    film = _read(data, "", {f.name for f in fields(Storyboard)}, _FILM_READERS, problems)
    shots = _read_shots(data.get("shots"), default_duration, problems)
    if problems:
        raise StoryboardError(problems, source)
    return Storyboard(shots=tuple(shots), **film)


def storyboard_from_prompts(
    prompts: Sequence[str], *, duration: Duration | None = None, transition: Transition = "continue"
) -> Storyboard:
    """A storyboard of prompts, a shot each, or several where a prompt names segments as Open-Sora's do.

    Args:
        prompts: At least one.
        duration: Of every shot that its prompt gives no length. Default: 5 seconds.
        transition: Between any two prompts.

    Raises:
        StoryboardError: If there is no prompt or one is unusable.
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
    """Shots, as plain values, of a prompt that may use the grammar of Open-Sora; see `arlon.text.prompts`.

    Raises:
        ValueError: If it uses it wrongly.
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


def with_overrides(storyboard: Storyboard, values: Mapping[str, Any], source: str = "options") -> Storyboard:
    """The storyboard with film-level values replaced; None in `values` means: leave as it is.

    Raises:
        StoryboardError: If a key is unknown or a value out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    problems: list[str] = []
    known = {f.name for f in fields(Storyboard)} - {"shots"}
    film = _read(given, "", known, _FILM_READERS, problems)
    if problems:
        raise StoryboardError(problems, source)
    return replace(storyboard, **film)


def with_shot(storyboard: Storyboard, index: int, values: Mapping[str, Any]) -> Storyboard:
    """The storyboard with values of one shot replaced; None in `values` means: leave as it is.

    Args:
        storyboard: The film.
        index: Of the shot, from 0.
        values: By the keys of a shot.

    Raises:
        StoryboardError: If a key is unknown or a value out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    problems: list[str] = []
    read = _read(given, "", {f.name for f in fields(Shot)}, _SHOT_READERS, problems)
    if problems:
        raise StoryboardError(problems, f"shot {index + 1}")
    shots = list(storyboard.shots)
    shots[index] = replace(shots[index], **read)
    return replace(storyboard, shots=tuple(shots))


def parse_duration(value: Any) -> Duration:
    """Read a duration: a number or "4.5" or "4.5s" in seconds, "36f" in frames, "2 segments".

    Raises:
        ValueError: If it is not a duration, not positive, or longer than an hour.
    """
    match = re.fullmatch(r"\s*([^\s]+?)\s*(s|f|frames|segments?)?\s*", str(value).lower())
    try:
        if isinstance(value, bool) or match is None:
            raise ValueError
        number = float(match[1])
        unit = _UNITS.get(match[2], "seconds")
        if unit != "seconds" and not number.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(
            f'must be seconds such as 4.5, frames such as "36f", or "2 segments", got {shown(value)}'
        ) from None
    if not number > 0:
        raise ValueError(f"must be more than 0, got {shown(value)}")
    if unit == "segments":
        if number > MAX_DURATION_SEGMENTS:
            raise ValueError(f"must be at most {MAX_DURATION_SEGMENTS} segments, got {shown(value)}")
        return Duration(segments=int(number))
    if number > (MAX_DURATION_S * MAX_FPS if unit == "frames" else MAX_DURATION_S):
        raise ValueError(f"must be at most one hour ({MAX_DURATION_S:.0f} s), got {shown(value)}")
    return Duration(frames=int(number)) if unit == "frames" else Duration(seconds=number)


def _read_shots(data: Any, default_duration: Duration | None, problems: list[str]) -> list[Shot]:
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        problems.append("shots must be a list of at least one shot with a prompt: give a prompt")
        return []
    if len(data) > MAX_SHOTS:
        problems.append(f"shots: at most {MAX_SHOTS} shots, got {len(data)}")
        return []
    shots = []
    known = {f.name for f in fields(Shot)}
    for index, item in enumerate(data):
        where = f"shots[{index}]"
        item = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping):
            problems.append(f"{where} must be a mapping with the key 'prompt', got {_kind(item)}")
            continue
        values = _read(item, f"{where}.", known, _SHOT_READERS, problems)
        if "prompt" not in item:
            problems.append(f"{where}.prompt is missing")
        elif values.get("blend") and values.get("transition") == "cut":
            problems.append(f"{where}.blend needs transition 'continue': behind a cut there is nothing to blend with")
        elif values.get("mask_strategy") and not values.get("references"):
            problems.append(f"{where}.mask_strategy places references: name them in {where}.references")
        elif "prompt" in values:
            shots.append(Shot(**({"duration": default_duration} if default_duration else {}) | values))
    return shots


def _read(
    data: Mapping[Any, Any],
    prefix: str,
    known: set[str],
    readers: Mapping[str, Callable[[Any], Any]],
    problems: list[str],
) -> dict[str, Any]:
    """Read the known keys of a mapping; what is wrong is added to `problems`."""
    values = {}
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
            name = key if str(key).isprintable() and len(str(key)) <= MAX_SHOWN else shown(key)
            problems.append(f"{prefix}{name}: unknown key; {hint}")
        elif key in readers and value is not None:
            try:
                values[key] = readers[key](value)
            except ValueError as error:
                problems.append(f"{prefix}{key} {error}")
        elif key in readers and key in ("prompt", "duration"):
            problems.append(f"{prefix}{key} is empty")
    return values


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"must be a number, got {shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}, got {shown(value)}")
        return float(value)

    return read


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number, got {shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, got {shown(value)}")
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {shown(value)}")
    text = " ".join(value.split())
    if len(text) > MAX_PROMPT_LENGTH:
        raise ValueError(f"must have at most {MAX_PROMPT_LENGTH} characters, got {len(text)}")
    strange = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs")), None)
    if strange is not None:
        raise ValueError(f"holds the control character U+{ord(strange):04X}: remove it")
    return text


def _prompt(value: Any) -> str:
    text = _text(value)
    if not text:
        raise ValueError("is empty: say what the shot shows")
    return text


def _shot_prompt(value: Any) -> str:
    text = _prompt(value)
    if is_script(text):
        raise ValueError(
            "holds segment marks or references of Open-Sora: give every text a shot of its own with `duration: 2 "
            "segments`, files in `references` and their places in `mask_strategy`"
        )
    return text


def _file_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"must be a list of files, got {shown(value)}")
    return tuple(_file_name(name) for name in value)


def _mask_strategy(value: Any) -> str:
    from arlon.diffusion.references import parse_mask_strategy

    text = _text(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    parse_mask_strategy(text)
    return text


def _camera_motion(value: Any) -> str:
    text = _prompt(value)
    add_scores("", camera=text)
    return text


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"must be the path of a file, got {shown(value)}")
    if re.match(r"\s*[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
        raise ValueError(f"must be the path of a file, got {shown(value)}: download it first")
    return value


def _aspect(value: Any) -> str:
    from arlon.data.aspect import aspect_ratio

    aspect_ratio(_prompt(value))
    return _prompt(value)


def _resolution(value: Any) -> str:
    from arlon.data.aspect import PIXEL_BUDGETS

    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _prompt(value)
    if name not in PIXEL_BUDGETS:
        raise ValueError(f"must be one of {', '.join(PIXEL_BUDGETS)}, got {shown(name)}")
    return name


def _transition(value: Any) -> str:
    if value not in get_args(Transition):
        raise ValueError(f"must be 'continue' or 'cut', got {shown(value)}")
    return value


def _film_seed(value: Any) -> int | None:
    seed = _whole(-1, MAX_SEED)(value)
    return None if seed == -1 else seed


_SHOT_READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": _shot_prompt,
    "duration": parse_duration,
    "transition": _transition,
    "blend": _whole(0, MAX_BLEND),
    "seed": _whole(0, MAX_SEED),
    "guidance_scale": _number(0.0, 100.0),
    "image": _file_name,
    "end_image": _file_name,
    "video": _file_name,
    "references": _file_names,
    "mask_strategy": _mask_strategy,
    "camera_motion": _camera_motion,
    "notes": _text,
}
_FILM_READERS: dict[str, Callable[[Any], Any]] = {
    "seed": _film_seed,
    "fps": _number(1.0, MAX_FPS),
    "height": _whole(2, MAX_SIZE),
    "width": _whole(2, MAX_SIZE),
    "model": _prompt,
    "negative_prompt": _text,
    "guidance_scale": _number(0.0, 100.0),
    "num_inference_steps": _whole(1, 1000),
    "solver": _prompt,
    "aspect": _aspect,
    "resolution": _resolution,
    "use_codes": _flag,
    "segment": _whole(1, MAX_DURATION_SEGMENTS),
    "overlap": _whole(1, MAX_DURATION_SEGMENTS),
    "aesthetic_score": _number(0.0, MAX_SCORE),
    "motion_score": _number(0.0, MAX_SCORE),
    "camera_motion": _camera_motion,
}
