"""Open registries: what is chosen by name can also come from another package.

Solvers, attention kernels, text encoders, injection designs, backbones and training stages are each kept in a
`Registry`. A module of another package adds its own with the `register` decorator. Arlon imports such modules at the
first name it does not know; they are

    - the modules named in the environment variable ARLON_PLUGINS, separated by commas, such as "my_solvers,lab.tiles";
    - the entry points of the group "arlon.plugins" of installed packages.

Both reach every process that makes a film, those of Ray on this machine included. `docs/extending.md` has an example of
each kind.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from arlon.errors import UsageError, did_you_mean

T = TypeVar("T")
Entry = TypeVar("Entry")

PLUGINS_VARIABLE = "ARLON_PLUGINS"
ENTRY_POINT_GROUP = "arlon.plugins"
_loaded: set[str] = set()


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: What an entry is, in the singular, for error messages: "solver".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that adds a function or class under a name.

        Raises:
            ValueError: If the name is taken.
        """

        def decorate(entry: Entry) -> Entry:
            self.add(name, entry)  # type: ignore[arg-type]  # the decorated object keeps its own type
            return entry

        return decorate

    def add(self, name: str, entry: T) -> None:
        """Add an entry under a name.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered: choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """Entry of a name; plugins are imported if the name is not known yet.

        Raises:
            UsageError: If there is none; the message names the nearest known one, or all.
        """
        if name not in self._entries:
            load_plugins()
        if name not in self._entries:
            raise UsageError(f"unknown {self.kind} {name!r}, {did_you_mean(name, sorted(self))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Whether a name is registered; plugins that were not imported yet do not count."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Known names, in the order in which they were added."""
        return iter(self._entries)

    def remove(self, name: str) -> None:
        """Forget an entry, so that a test or a notebook can register it again."""
        self._entries.pop(name, None)


def load_plugins() -> None:
    """Import the plugin modules that were not imported yet.

    Raises:
        ImportError: If one cannot be imported; the message names it and where its name came from.
    """
    named = {name.strip(): PLUGINS_VARIABLE for name in os.environ.get(PLUGINS_VARIABLE, "").split(",") if name.strip()}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        named.setdefault(point.module, f"entry point {point.name!r}")
    for module, origin in named.items():  # each registers its entries while it is imported
        if module in _loaded:
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"cannot import the plugin {module!r} ({origin}): {error}") from error
        _loaded.add(module)


def forget(module: str) -> None:
    """Import a plugin module again when it is needed next, so that a test or a notebook can change it."""
    _loaded.discard(module)
