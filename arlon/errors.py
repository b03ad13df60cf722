"""Exceptions of Arlon, and the helpers that word their messages.

Every exception derives from `ArlonError`, so that one `except` catches whatever Arlon refuses, and also from a
built-in exception (`ValueError` for bad input). Messages are for people: what is wrong, what was expected, what to do.
A missing file stays Python's `FileNotFoundError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_LISTED = 20
"""Most problems that a message of several lines lists."""
MAX_NAMED = 4
"""Most names that a message of one line lists."""


class ArlonError(Exception):
    """Base class of the exceptions that Arlon raises on purpose."""


class UsageError(ArlonError, ValueError):
    """A request that cannot be carried out as stated; raised before any work starts."""


class StoryboardError(UsageError):
    """Everything that is wrong with a storyboard, one problem a line.

    Args:
        problems: One sentence for each problem.
        source: Name of the storyboard, for the message.
    """

    def __init__(self, problems: Sequence[str], source: str = "storyboard") -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            super().__init__(f"{source} has {len(self.problems)} problems:\n{indent_lines(self.problems)}")


class ConfigError(ArlonError, ValueError):
    """A configuration that cannot be built; the message is one line and names the dotted key."""


class CheckpointError(ArlonError, ValueError):
    """Weights or a model folder that cannot be used; the message names the file and what is wrong."""


class VideoError(ArlonError, ValueError):
    """A file that cannot be read as video, or frames that cannot be written as one."""


class ManifestError(ArlonError, ValueError):
    """A manifest, or a folder to make one from, that cannot be used; the message lists every problem."""


def one_line(error: BaseException, max_length: int | None = None) -> str:
    """First line of the message of an error, or the name of its class if it has no message.

    Args:
        error: Any exception; those of libraries often have long messages.
        max_length: Number of characters after which the line is cut; None keeps all.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip()[:max_length]


def shorten_list(names: Sequence[str], limit: int = MAX_NAMED, separator: str = ", ") -> str:
    """The first `limit` names in one line, and how many more there are: `a, b and 7 more`."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def indent_lines(lines: Sequence[str], limit: int = MAX_LISTED) -> str:
    """The first `limit` lines, each indented, and a last one that says how many more there are."""
    rest = len(lines) - limit
    shown = [*lines[:limit], *([f"... and {rest} more"] if rest > 0 else [])]
    return "\n".join(f"  {line}" for line in shown)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Advice for an unknown name: the closest known one as a question, or all of them if none is close.

    The text continues a message: `unknown solver 'eulr', did you mean 'euler'?` or `unknown solver 'x', choose from
    'euler', 'midpoint'`.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(map(repr, names))}"
