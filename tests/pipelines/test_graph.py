"""The Ray graph against the local run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import graph
from pipelines.generate import Prepared, generate
from pipelines.run_folder import RunFolder
from tests.pipelines.films import prepared_film

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every actor that is started."""
    started: list[Any] = []
    start = graph._start_actor

    def remembered(*arguments: Any) -> Any:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(graph, "_start_actor", remembered)
    return started


def assert_all_ended(ray: Any, actors: list[Any]) -> None:
    assert len(actors) == 5
    for actor in actors:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.close.remote())


def test_graph_equals_local_bit_for_bit(ray_session: Any, actors: list[Any], tiny_model: Path, tmp_path: Path) -> None:
    local = generate(prepared_film(tiny_model, tmp_path / "local.mp4"))
    done: list[int] = []
    made = generate(
        prepared_film(tiny_model, tmp_path / "graph.mp4"),
        executor="ray",
        on_progress=lambda progress: done.append(progress.result.segment.index),
    )
    assert done == [0, 1, 2]
    assert made.film.read_bytes() == local.film.read_bytes()
    folders = RunFolder(local.run_dir), RunFolder(made.run_dir)
    for index in range(3):
        first, second = (folder.read_segment(index) for folder in folders)
        assert first == second
    first, second = (folder.read_codes() for folder in folders)
    assert all(first[take].equal(second[take]) for take in (0, 1))
    assert_all_ended(ray_session, actors)


def test_error_of_a_worker_arrives_as_it_was_raised(
    ray_session: Any, actors: list[Any], tiny_model: Path, tmp_path: Path
) -> None:
    prepared = prepared_film(tiny_model, tmp_path / "a.mp4")
    broken = _without_component(prepared, tmp_path / "broken", tiny_model)
    with pytest.raises(FileNotFoundError, match="dit") as caught:
        generate(broken, executor="ray")
    assert "ray::" not in str(caught.value)
    assert_all_ended(ray_session, actors)


def _without_component(prepared: Prepared, folder: Path, model: Path) -> Prepared:
    """The same job on a model folder that lost its DiT after the checks."""
    folder.mkdir()
    for part in model.iterdir():
        if part.name != "dit":
            (folder / part.name).symlink_to(part)
    return replace(prepared, job=replace(prepared.job, model_path=str(folder)))
