"""The Ray graph against the local run."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arlon.config import ConfigError, load_config
from arlon.film.storyboard import UsageError
from pipelines.batch import ray_batch as batch_graph
from pipelines.cli import app
from pipelines.executors import ray_graph as graph
from pipelines.executors.ray_graph import GraphConfig, Role
from pipelines.runs.generate import FilmResult, generate
from pipelines.runs.prepare import Prepared
from pipelines.runs.resume import continue_run, open_run
from pipelines.store.run_folder import RunFolder
from tests.pipelines.films import prepared_film

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> FilmResult:
    """A film of three segments in two takes, made without Ray."""
    return generate(prepared_film(tiny_model, tmp_path_factory.mktemp("local") / "film.mp4"))


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every actor that is started."""
    started: list[Any] = []
    start = graph.start_actor

    def remembered(*arguments: Any) -> Any:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(graph, "start_actor", remembered)
    return started


def assert_all_ended(ray: Any, actors: list[Any], number: int = 5) -> None:
    assert len(actors) == number
    for actor in actors:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.close.remote())


def commits(run_dir: Path) -> Counter[int]:
    """How often each segment was committed."""
    return Counter(event["segment"] for event in RunFolder(run_dir).events() if event["event"] == "commit")


def test_graph_equals_local_bit_for_bit_and_notes_the_depth_of_its_queues(
    ray_session: Any, actors: list[Any], film: FilmResult, tiny_model: Path, tmp_path: Path
) -> None:
    done: list[int] = []
    made = generate(
        prepared_film(tiny_model, tmp_path / "graph.mp4"),
        executor="ray",
        on_progress=lambda progress: done.append(progress.result.segment.index),
    )
    assert done == [0, 1, 2]
    assert made.film.read_bytes() == film.film.read_bytes()
    folders = RunFolder(film.run_dir), RunFolder(made.run_dir)
    for index in range(3):
        first, second = (folder.read_segment(index) for folder in folders)
        assert first == second
    first, second = (folder.read_codes() for folder in folders)
    assert all(first[take].equal(second[take]) for take in (0, 1))
    assert_all_ended(ray_session, actors)
    events = list(folders[1].events())
    depths = [event for event in events if event["event"] == "queue"]
    assert [sum(event[role] for role in ("refine", "decode", "write")) for event in depths] == [2, 1, 0]
    steps = [event for event in events if event["event"] == "step"]
    assert all(event["time"] - 60 < event["ended"] <= event["time"] + 1 for event in steps)


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


def test_two_replicas_of_every_role_make_the_same_film_with_blended_prompts_and_borders(
    ray_session: Any, actors: list[Any], tiny_model: Path, tmp_path: Path
) -> None:
    shots = (
        {"prompt": "a red circle", "duration": "51f"},
        {"prompt": "a blue square", "duration": "51f", "blend": 2},
        {"prompt": "a green circle", "duration": "51f", "transition": "cut"},
        {"prompt": "a red square", "duration": "34f", "blend": 1},
    )
    settings, done, two = {"vae_blend_frames": 2}, list[int](), Role(replicas=2)
    local = generate(prepared_film(tiny_model, tmp_path / "local.mp4", *shots, settings=settings))
    made = generate(
        prepared_film(tiny_model, tmp_path / "graph.mp4", *shots, settings=settings),
        executor="ray",
        graph=GraphConfig(text=two, code=two, refine=two, decode=two, max_in_flight=1),
        on_progress=lambda progress: done.append(progress.result.segment.index),
    )
    assert made.film.read_bytes() == local.film.read_bytes()
    takes = [[segment.index for segment in open_run(made.run_dir).plan.segments if segment.take == t] for t in (0, 1)]
    assert sorted(done) == sorted(takes[0] + takes[1])
    assert all([index for index in done if index in take] == take for take in takes)
    assert_all_ended(ray_session, actors, 9)


def test_an_actor_that_dies_is_started_again_and_does_only_its_segment_again(
    ray_session: Any, film: FilmResult, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "RoleActor", mortal_actor(tmp_path / "calls", deaths=1))
    made = generate(prepared_film(tiny_model, tmp_path / "graph.mp4"), executor="ray")
    assert made.film_hash == film.film_hash
    assert commits(made.run_dir) == {0: 1, 1: 1, 2: 1}
    calls: dict[str, list[Any]] = {}
    for line in (tmp_path / "calls").read_text().splitlines():
        role, request = json.loads(line)
        calls.setdefault(role, []).append(request)
    # Ray repeats a call behind those that were waiting, so the order of calls is open.
    assert {role: sorted(calls[role]) for role in ("code", "refine", "write")} == {
        "code": [[0, 0], [0, 1], [0, 1], [1, 0]],
        "refine": [0, 1, 1, 2],
        "write": [0, 1, 1, 2],
    }
    assert len(calls["decode"]) == 4
    assert Counter(map(tuple, calls["text"])).most_common(1)[0][1] == 2


def test_a_film_whose_actor_dies_every_time_ends_and_can_go_on(
    ray_session: Any,
    actors: list[Any],
    film: FilmResult,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph, "RoleActor", mortal_actor(tmp_path / "calls", deaths=99, roles=("refine",)))
    monkeypatch.setattr(graph, "MAX_RESTARTS", 0)
    prepared = prepared_film(tiny_model, tmp_path / "graph.mp4")
    with pytest.raises(RuntimeError, match="a worker process died"):
        generate(prepared, executor="ray")
    assert_all_ended(ray_session, actors)
    run = open_run(prepared.paths.run_dir)
    made = generate(run.prepared, begin=lambda *_: continue_run(run))
    assert made.film_hash == film.film_hash
    assert made.num_made == 2
    assert commits(made.run_dir) == {0: 1, 1: 1, 2: 1}


def mortal_actor(log: Path, *, deaths: int, roles: tuple[str, ...] = tuple(graph.WORKER_OF_ROLE)) -> type:
    """Actors that log what they are asked, and die of it; each role `deaths` times, in the middle of the film.

    The writer dies when it has committed a segment and not yet answered. The class is made here so that it is sent to
    the actors whole, with what it closes over.
    """
    path = str(log)

    class Mortal(graph.RoleActor):
        def run(self, request: Any, **results: Any) -> Any:
            key, is_fatal = self.asked(request)
            with open(path, "a") as file:
                file.write(json.dumps([self.role, key]) + "\n")
            if self.role == "write":
                result = super().run(request, **results)
                self.die(is_fatal)
                return result
            self.die(is_fatal)
            return super().run(request, **results)

        def asked(self, request: Any) -> tuple[Any, bool]:
            if self.role in ("refine", "write"):
                return request.segment.index, request.segment.index == 1
            if self.role == "code":
                return (request.take, int(request.start > 0)), request.start > 0
            if self.role == "text":
                return request.prompts, True
            return request.num_frames, request.num_frames == 34

        def die(self, is_fatal: bool) -> None:
            died = f"{path}.{self.role}"
            before = os.path.getsize(died) if os.path.exists(died) else 0
            if is_fatal and self.role in roles and before < deaths:
                with open(died, "a") as file:
                    file.write(".")
                os.kill(os.getpid(), signal.SIGKILL)

    return Mortal


def test_actors_that_do_not_fit_are_refused(ray_session: Any, tiny_model: Path, tmp_path: Path) -> None:
    crowd = GraphConfig(decode=Role(replicas=20, num_cpus=2))
    with pytest.raises(UsageError, match="the actors need 40 CPU, the cluster has 4"):
        generate(prepared_film(tiny_model, tmp_path / "graph.mp4"), executor="ray", graph=crowd)
    assert not (tmp_path / "graph.run").exists()


def test_graph_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text("refine: {replicas: 2}\ndecode: {num_gpus: 0.5}\nmax_in_flight: 5\n")
    config = load_config(GraphConfig, [path])
    assert (config.refine, config.decode) == (Role(replicas=2, num_gpus=0.7), Role(num_gpus=0.5))
    assert (config.code, config.max_in_flight) == (Role(), 5)
    for text, error, message in (
        ("refine: {replicas: 0}", ValueError, "replicas must be between 1 and 1024, got 0"),
        ("write: {replicas: 2}", ConfigError, "write"),
        ("max_in_flight: 0", ValueError, "max_in_flight must be 1 or more"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=message):
            load_config(GraphConfig, [path])


def test_a_batch_outlives_a_bad_storyboard_and_a_killed_pipeline(
    ray_session: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_graph, "FilmPipeline", mortal_pipeline(tmp_path / "died"))
    board = {"shots": [{"prompt": "a red circle", "duration": "85f"}]}
    lines = [{"name": f"film {number}", "seed": number, **board} for number in range(6)]
    path = tmp_path / "films.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"name": "bad", "shots": [{"duration": 3}]}])))
    options = ("--threads", "1", "--executor", "ray", "--pipelines", "2", "--json")
    command = ["batch", str(path), "--output-dir", str(tmp_path / "out"), "--model", str(tiny_model), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.stderr
    told = json.loads(result.stdout)
    assert (told["done"], told["skipped"], told["failed"]) == (6, 0, 1)
    assert told["films"][-1]["error"] == "storyboard: shots[0].prompt is missing"
    assert [film["num_attempts"] for film in told["films"]].count(2) == 1
    (again,) = (film for film in told["films"] if film["num_attempts"] == 2)
    assert again["num_made"] == 1
    assert commits(tmp_path / "out" / again["name"]) == {0: 1, 1: 1}
    shot = {"prompt": "a red circle", "duration": "85f"}
    alone = prepared_film(tiny_model, tmp_path / "alone.mp4", shot, seed=int(again["name"].split()[1]))
    assert generate(alone).film.read_bytes() == Path(again["film"]).read_bytes()
    result = CliRunner().invoke(app, command)
    assert json.loads(result.stdout)["skipped"] == 6


def mortal_pipeline(marker: Path) -> type:
    """Pipelines of which the first to decode a second segment dies of it."""
    path = str(marker)

    class Mortal(batch_graph.FilmPipeline):
        def make(self, task: Any) -> Any:
            from arlon.film.workers import DecodeWorker

            decode = DecodeWorker.run

            def mortal(worker: Any, request: Any) -> Any:
                if request.num_frames == 34 and not os.path.exists(path):
                    open(path, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
                return decode(worker, request)

            DecodeWorker.run = mortal
            try:
                return super().make(task)
            finally:
                DecodeWorker.run = decode

    return Mortal


def test_more_pipelines_than_there_is_room_for_are_refused(ray_session: Any, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "films.jsonl"
    path.write_text('["a"]\n["b"]')
    options = ("--model", str(tiny_model), "--executor", "ray", "--pipelines", "3", "--threads", "2")
    result = CliRunner().invoke(app, ["batch", str(path), "--output-dir", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert "3 pipelines of 2 CPU each do not fit: the cluster has 4 CPU" in result.stderr


def test_workers_of_a_ray_for_one_film_have_the_priority_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    seen: list[str | None] = []
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(os.environ.get("RAY_worker_niceness")))  # noqa: SIM112
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with graph.ray_session(None):
        pass
    monkeypatch.delenv("RAY_worker_niceness")
    with graph.ray_session("127.0.0.1:1"):
        pass
    monkeypatch.setenv("RAY_worker_niceness", "7")
    with graph.ray_session(None):
        pass
    assert seen == ["0", None, "7"]
