"""The encoded media of a film, read back from its run folder."""

from __future__ import annotations

from arlon.film.media import reference_names
from arlon.film.plan import Plan
from arlon.film.take_media import TakeMedia, take_media
from pipelines.store.run_folder import RunFolder


def read_media(folder: RunFolder, plan: Plan) -> dict[int, TakeMedia]:
    """What the shots of a film are given, by shot; nothing is read for a film without files.

    Args:
        folder: Run folder of the film.
        plan: The film.

    Raises:
        FileNotFoundError: If the film names files and the run folder has no `references.safetensors`.
        RunFolderError: If that file is damaged.
    """
    return take_media(plan, folder.read_references()) if reference_names(plan.storyboard) else {}
