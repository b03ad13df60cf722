"""The Ray graph against the local run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.generate import generate
from pipelines.run_folder import RunFolder
from tests.pipelines.films import prepared_film

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_graph_equals_local_bit_for_bit(ray_session: Any, tiny_model: Path, tmp_path: Path) -> None:
    local = generate(prepared_film(tiny_model, tmp_path / "local.mp4"))
    done: list[int] = []
    graph = generate(
        prepared_film(tiny_model, tmp_path / "graph.mp4"),
        executor="ray",
        on_progress=lambda progress: done.append(progress.result.segment.index),
    )
    assert done == [0, 1, 2]
    assert graph.film.read_bytes() == local.film.read_bytes()
    folders = RunFolder(local.run_dir), RunFolder(graph.run_dir)
    for index in range(3):
        first, second = (folder.read_segment(index) for folder in folders)
        assert first == second
    first, second = (folder.read_codes() for folder in folders)
    assert all(first[take].equal(second[take]) for take in (0, 1))
    assert not _living_actors(ray_session)


def test_error_of_a_worker_arrives_as_it_was_raised(ray_session: Any, tiny_model: Path, tmp_path: Path) -> None:
    prepared = prepared_film(tiny_model, tmp_path / "a.mp4")
    weights = tmp_path / "model"
    weights.symlink_to(tiny_model)
    broken = _without_component(prepared, tmp_path / "broken", tiny_model)
    with pytest.raises(FileNotFoundError, match="dit") as caught:
        generate(broken, executor="ray")
    assert "ray::" not in str(caught.value)
    assert not _living_actors(ray_session)


def _without_component(prepared: Any, folder: Path, model: Path) -> Any:
    """The same job on a model folder that lost its DiT after the checks."""
    from dataclasses import replace

    folder.mkdir()
    for part in model.iterdir():
        if part.name != "dit":
            (folder / part.name).symlink_to(part)
    return replace(prepared, job=replace(prepared.job, model_path=str(folder)))


def _living_actors(ray: Any) -> list[str]:
    from ray.util.state import list_actors

    del ray
    return [actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])]
