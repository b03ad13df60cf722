"""Film sets that were rendered: measured, measured again, exported; and sets with something wrong in them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from arlon.data.video_io import VideoWriter, probe, read_video
from arlon.evaluation import cases as suite
from arlon.evaluation.metric_table import FIGURES
from arlon.evaluation.vbench.networks import NO_ARCHITECTURE
from arlon.film.record import RECORD_TAG
from arlon.film.storyboard import UsageError
from arlon.shapes import world
from pipelines.cli import app
from pipelines.commands.evaluate import SHOWN_FIGURES
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation import vbench_export
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.film_set import FilmFile, Problem, add_prompts, find_films, outline_of
from pipelines.evaluation.plots import nice_range
from pipelines.evaluation.vbench_export import export_films

FPS = 8.0
RED = "a large red square moves left slowly on a grey background"
BLUE = "a large blue square moves left slowly on a grey background"
LOOK = world.ObjectLook(colour="red", shape="square", size="large", motion="left", speed="slow")


def frames_of(*colours: str, length: int = 16) -> np.ndarray:
    shots = tuple(
        world.Shot(
            objects=(world.ObjectLook(colour=c, shape="square", size="large", motion="left", speed="slow"),),
            background="grey",
            seconds=length / FPS,
        )
        for c in colours
    )
    scene = world.Scene(shots=shots, start=((0.5, 0.5),), phase=(0.0,))
    return world.render_scene(scene, height=48, width=48, fps=FPS, num_frames=length * len(colours)).frames


def timeline(*prompts: str, length: int = 16, transition: str = "continue") -> dict[str, object]:
    shots = [
        {"prompt": prompt, "transition": transition, "start_frame": i * length, "num_frames": length}
        for i, prompt in enumerate(prompts)
    ]
    return {"timeline": {"fps": FPS, "shots": shots, "segment_starts": list(range(0, length * len(prompts), 8))}}


def write_film(path: Path, frames: np.ndarray, record: dict[str, object] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = {} if record is None else {RECORD_TAG: json.dumps(record)}
    with VideoWriter(path, fps=FPS, crf=1, tags=tags) as writer:
        writer.append(frames)
    return path


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films that show what they were asked for, and one whose second shot does not."""
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "a.mp4", frames_of("red", "blue"), timeline(RED, BLUE))
    write_film(folder / "b" / "film.mp4", frames_of("blue", "red"), timeline(BLUE, RED))
    write_film(folder / "c.mp4", frames_of("red", "red"), timeline(RED, BLUE))
    return folder


@pytest.fixture(scope="module")
def measured(films: Path, tmp_path_factory: pytest.TempPathFactory) -> evaluation.Evaluation:
    return evaluate([films], tmp_path_factory.mktemp("results"))


def test_what_networks_found_is_shown_too():
    needed = {name for name, figure in FIGURES.items() if figure.backbone}
    assert needed - set(SHOWN_FIGURES) == {*NO_ARCHITECTURE}


def test_the_figures_are_those_of_the_films(measured):
    record = json.loads(measured.result.read_text())
    assert [film["name"] for film in record["films"]] == ["a.mp4", "b/film.mp4", "c.mp4"]
    assert [film["figures"]["prompt_colour"] for film in record["films"]] == [1.0, 1.0, 0.5]
    share = record["figures"]["prompt_colour"]
    assert share["mean"] == pytest.approx(5 / 6)
    assert (share["low"], share["high"]) == pytest.approx(suite.bootstrap_interval(np.array([1.0, 1.0, 0.5])))
    assert [share["mean"] for share in record["by_shot"]["colour"]] == pytest.approx([1, 2 / 3])
    assert record["figures"]["switch_appears"]["mean"] == pytest.approx(2 / 3)
    assert record["figures"]["seam_strength"]["count"] == 3
    assert record["problems"] == []
    assert measured.figures["prompt_shape"].mean == 1


def test_no_path_of_the_machine_is_written(measured, films):
    for file in (measured.result, measured.page):
        assert str(films) not in file.read_text()


def test_films_are_measured_once(films, measured):
    before = measured.result.read_bytes(), measured.page.read_bytes()
    progress: list[evaluation.EvaluationProgress] = []
    again = evaluate([films], measured.result.parent, on_progress=progress.append)
    assert (again.num_reused, progress) == (3, [])
    assert (again.result.read_bytes(), again.page.read_bytes()) == before


def test_only_a_film_that_changed_is_measured_again(films, measured, tmp_path):
    folder, output, names = tmp_path / "films", tmp_path / "out", []
    shutil.copytree(films, folder)
    shutil.copytree(measured.result.parent, output)
    (folder / "a.mp4").rename(folder / "z.mp4")  # the content is what counts
    write_film(folder / "c.mp4", frames_of("red", "blue"), timeline(RED, BLUE, transition="cut"))
    again = evaluate([folder], output, on_progress=lambda progress: names.append(progress.name))
    assert names == ["c.mp4"]
    assert again.figures["prompt_colour"].mean == 1


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(films, tmp_path, monkeypatch):
    def stop(progress: evaluation.EvaluationProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([films], tmp_path, on_progress=stop)
    names: list[str] = []
    evaluate([films], tmp_path, on_progress=lambda progress: names.append(progress.name))
    assert len(names) == 2


@pytest.mark.slow
def test_several_workers_find_the_same(films, measured, tmp_path):
    other = evaluate([films], tmp_path, num_workers=2)
    assert other.result.read_bytes() == measured.result.read_bytes()
    assert other.page.read_bytes() == measured.page.read_bytes()


@pytest.mark.slow
def test_what_cannot_be_measured_is_named_and_the_rest_is_measured(films, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    whole = (folder / "a.mp4").read_bytes()
    write_film(folder / "short.mp4", frames_of("red"), timeline(RED, BLUE))
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    endless = timeline(RED)
    endless["timeline"]["shots"][0]["num_frames"] = float("inf")
    write_film(folder / "endless.mp4", frames_of("red"), endless)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"a.mp4": [RED, BLUE], "gone.mp4": RED, "c.mp4": 3}))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    sources = (folder, tmp_path / "missing.mp4", nothing)
    result = arlon(*sources, "--output", tmp_path / "out", "--prompts", prompts, "--workers", 1, "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["num_films"] == 3
    assert found["figures"]["prompt_shape"]["count"] == 3
    reasons = {(problem["source"], problem["reason"]) for problem in found["problems"]}
    text = "\n".join(f"{source}: {reason}" for source, reason in sorted(reasons))
    for source in ("broken.mp4", "empty.mp4", "cut.mp4", "short.mp4", "missing.mp4: no such file", "nothing: no film"):
        assert source in text, text
    for source in ("link.mp4: cannot be read", "pipe.mp4: cannot be read", "endless.mp4: its record has no usable"):
        assert source in text, text
    assert "cut off: its record names 32 frames, it has 16" in text
    assert "'gone.mp4': no such film" in text
    assert "'c.mp4': expected a prompt or a list of prompts, got 3" in text
    assert "no prompt for the film 'b/film.mp4'" in text
    assert f"{len(reasons)} problems; 3 films measured" in result.stderr
    assert "broken.mp4" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_a_film_that_ends_its_process_is_the_only_one_that_is_not_measured(films, tmp_path, monkeypatch):
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    shutil.copy(folder / "a.mp4", folder / "killer.mp4")

    def deadly(path):
        if path.name == "killer.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_video(path)

    monkeypatch.setattr(evaluation, "read_video", deadly)
    monkeypatch.setattr(evaluation, "film_key", lambda film, backbones: film.path.stem + film.path.parent.name)
    context = multiprocessing.get_context("fork")  # so that the processes have the function of above
    monkeypatch.setattr(evaluation.multiprocessing, "get_context", lambda kind: context)
    found = evaluate([folder], tmp_path / "out", num_workers=2)
    assert found.num_films == 3
    assert [problem.source for problem in found.problems] == ["killer.mp4"]
    assert "ended the process" in found.problems[0].reason


def _pool_of_one(connection) -> None:
    with evaluation._pool({}, "cpu", 1) as pool:
        connection.send(pool.submit(os.getpid).result())
        connection.recv()  # for ever


@pytest.mark.slow
def test_workers_end_with_an_evaluation_that_is_killed():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=_pool_of_one, args=(there,))
    owner.start()
    worker = here.recv()
    owner.kill()
    owner.join()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and _state(worker) != "Z":
        assert time.monotonic() < deadline, f"process {worker} is still there"
        time.sleep(0.1)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "Z"


def test_a_link_has_its_own_name(films, tmp_path):
    (tmp_path / f"{RED}-0.mp4").symlink_to(films / "a.mp4")
    (found,), problems = find_films([tmp_path])
    assert (found.name, problems) == (f"{RED}-0.mp4", [])


def test_a_backbone_that_is_none_is_a_problem_not_the_end(films, tmp_path):
    problem = f"subject_consistency={tmp_path}"
    result = arlon(films / "a.mp4", "--output", tmp_path / "out", "--backbone", problem, "--workers", 1)
    assert result.exit_code == 1
    assert "is not a DINO vision transformer: it has no config.json" in result.stderr
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["figures"]["prompt_colour"]["mean"] == 1
    assert record["figures"]["subject_consistency"]["count"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", 0), "--workers must be at least 1"),
        (("--backbone", "motion_smoothness=amt"), "--backbone must be DIMENSION=MODEL"),
        (("--backbone", "subject_consistency"), "--backbone must be DIMENSION=MODEL"),
        (("--backbone", "subject_consistency=a", "--backbone", "subject_consistency=b"), "is given twice: 'a' and 'b'"),
    ],
)
def test_wrong_usage_is_refused_before_the_work(films, tmp_path, arguments, message):
    result = arlon(films, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_nothing_says_why(tmp_path):
    with pytest.raises(UsageError, match=r"(?s)no film.*no such file"):
        evaluate([tmp_path / "missing"], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        evaluate([tmp_path], tmp_path / "file")


# --- the page ------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere(measured):
    text = measured.page.read_text()
    page = _Page(text)
    assert page.open == []
    links = [value for _, attrs in page.seen for name, value in attrs.items() if name in ("src", "href")]
    assert len(links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {tag for tag, _ in page.seen} & {"script", "link", "iframe"}
    plots = {attrs["aria-label"] for tag, attrs in page.seen if tag == "svg" and attrs["class"] == "plot"}
    assert {"colour by shot", "prompt accuracy by quarter of the film", "seam strength of every film"} < plots
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


def test_what_films_say_of_themselves_cannot_become_markup(films, tmp_path):
    evil = "<script>alert(1)</script> & more"
    write_film(tmp_path / "films" / "<b>x</b> film.mp4".replace("/", "|"), frames_of("red"), timeline(evil))
    (tmp_path / "films" / "<i>.mp4").write_bytes(b"x")
    found = evaluate([tmp_path / "films"], tmp_path / "out")
    page = _Page(found.page.read_text())
    assert not {tag for tag, _ in page.seen} & {"script", "b>", "i"}
    assert "&lt;i&gt;.mp4" in found.page.read_text()


@pytest.mark.skipif(os.sep != "/", reason="names of files are bytes on Unix only")
def test_a_name_that_is_no_unicode_ends_nothing(tmp_path):
    name = os.fsdecode(b"a red caf\xe9-0.mp4")
    write_film(tmp_path / "films" / name, frames_of("red", length=4))
    (tmp_path / "films" / os.fsdecode(b"broken \xff.mp4")).write_bytes(b"x")
    found = evaluate([tmp_path / "films", tmp_path / os.fsdecode(b"missing \xff")], tmp_path / "out")
    assert (found.num_films, len(found.problems)) == (1, 2)
    assert json.loads(found.result.read_text())["films"][0]["name"] == name
    assert r"a red caf\udce9-0.mp4" in found.page.read_text()
    assert export_films([tmp_path / "films"], tmp_path / "vbench").num_videos == 1
    assert (tmp_path / "vbench" / "videos" / name).is_file()


def test_axes_have_round_ends_around_the_values():
    assert nice_range(0.13, 0.87) == pytest.approx((0.1, 0.9))
    assert nice_range(3.0, 3.0) == pytest.approx((2.5, 3.5))
    low, high = nice_range(-0.013, 0.0271)
    assert low <= -0.013
    assert high >= 0.0271


# --- film sets -----------------------------------------------------------------------------------------------


def test_pieces_and_growing_films_are_not_films(films, tmp_path):
    run = tmp_path / "set" / "take.run"
    write_film(run / "segments" / "0000" / "fragment.mp4", frames_of("red"))
    (run / "segments" / "0000" / "segment.json").touch()
    write_film(tmp_path / "set" / "take.mp4", frames_of("red"))
    write_film(tmp_path / "set" / "other.partial.mp4", frames_of("red"))
    write_film(tmp_path / "set" / "out" / "export.mp4", frames_of("red"))
    found, problems = find_films([tmp_path / "set", tmp_path / "set" / "take.mp4"], leave_out=tmp_path / "set" / "out")
    assert [film.name for film in found] == ["take.mp4"]
    assert problems == []


def test_results_may_go_where_the_films_are(tmp_path):
    (tmp_path / "take.mp4").touch()
    found, problems = find_films([tmp_path], leave_out=tmp_path)
    assert [film.name for film in found] == ["take.mp4"]
    assert problems == []


def test_the_stream_of_a_film_is_not_a_second_film(tmp_path):
    (tmp_path / "take.hls").mkdir()
    for name in ("take.mp4", "take.hls/stream.mp4", "take.hls/film.m3u8"):
        (tmp_path / name).touch()
    assert [film.name for film in find_films([tmp_path])[0]] == ["take.mp4"]
    assert [film.name for film in find_films([tmp_path / "take.hls"])[0]] == ["stream.mp4"]


def test_numbered_films_are_in_the_order_of_their_numbers(tmp_path):
    names = ["1.mp4", "2 b.mp4", "2a.mp4", "10.mp4", "a/9.mp4", "a/09x.mp4", "a/11.mp4", "b.mp4", "b2.mp4", "b10.mp4"]
    (tmp_path / "a").mkdir()
    for name in names:
        (tmp_path / name).touch()
    found, _ = find_films([tmp_path])
    assert [film.name for film in found] == names
    added, _ = add_prompts(found, _text(tmp_path, *(f"prompt {i}" for i in range(len(names)))))
    assert (added[3].name, added[3].prompts) == ("10.mp4", ("prompt 3",))


def test_prompts_come_from_file_then_record_then_name(tmp_path):
    path = write_film(tmp_path / "a red square-3.mp4", frames_of("red"))
    film = FilmFile(name=path.name, path=path)
    assert outline_of(film, {}, 16).shots[0].prompt == "a red square"
    path.with_suffix(".json").write_text(json.dumps(timeline("from the sidecar")))
    assert outline_of(film, {}, 16).shots[0].prompt == "from the sidecar"
    tags = {RECORD_TAG: json.dumps(timeline("from inside"))}
    assert outline_of(film, tags, 16).shots[0].prompt == "from inside"
    assert outline_of(film, {RECORD_TAG: "holiday 2019"}, 16).shots[0].prompt == "from the sidecar"
    assert outline_of(film, {RECORD_TAG.upper(): tags[RECORD_TAG]}, 16).shots[0].prompt == "from inside"  # Matroska
    (given,), _ = add_prompts([film], _text(tmp_path, "from the file"))
    assert outline_of(given, tags, 16).shots[0].prompt == "from the file"


def _text(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines))
    return path


def test_given_prompts_share_a_film_evenly_or_follow_its_shots(tmp_path):
    film = FilmFile(name="a.mp4", path=tmp_path / "a.mp4", prompts=("one", "two", "three"))
    shots = outline_of(film, {}, 17).shots
    assert [(s.start_frame, s.num_frames) for s in shots] == [(0, 6), (6, 5), (11, 6)]
    with pytest.raises(ValueError, match="3 prompts are given for its 2 shots"):
        outline_of(film, {RECORD_TAG: json.dumps(timeline("x", "y"))}, 32)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("p.txt", "one\ntwo"), ("p.json", "[1]"), ("p.json", "{"), ("p.json", None), ("p.json", "pipe")),
        ("p.jsonl", '{"a.mp4": "x"}'),
    ],
)
def test_a_prompt_file_of_a_wrong_form_changes_nothing(tmp_path, name, content):
    film = FilmFile(name="a.mp4", path=tmp_path / "a.mp4")
    if content == "pipe":
        os.mkfifo(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_text(content)
    films, problems = add_prompts([film], tmp_path / name)
    assert films == [film]
    assert isinstance(problems[0], Problem)
    assert problems[0].source == name
    assert "not a prompt file" in problems[0].reason


def test_a_film_with_another_number_of_shots_than_prompts_stays_as_it_is(films, tmp_path):
    found, _ = find_films([films])
    added, problems = add_prompts(found, _text(tmp_path, "one", "two", "three"))
    assert added == found
    assert problems[0].reason == "'a.mp4': 1 prompt is given for its 2 shots; those of its record are used"
    assert len(problems) == 3


def test_a_film_that_was_changed_after_it_was_made_is_refused(tmp_path):
    film, tags = FilmFile(name="a.mp4", path=tmp_path / "a.mp4"), {RECORD_TAG: json.dumps(timeline("x", "y"))}
    for num_frames, reason in ((96, "it was changed: .* 32 frames, it has 96"), (16, "it is cut off: .* 32 .* 16")):
        with pytest.raises(ValueError, match=reason):  # such as by a copy at 24 instead of 8 frames a second
            outline_of(film, tags, num_frames)


def test_a_damaged_record_is_refused(tmp_path):
    film = FilmFile(name="a.mp4", path=tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no usable timeline"):
        outline_of(film, {RECORD_TAG: json.dumps({"timeline": {"shots": [{"prompt": "x"}]}})}, 9)
    for name, value in (("start_frame", -1), ("num_frames", 0)):
        damaged = timeline("x")
        damaged["timeline"]["shots"][0][name] = value
        with pytest.raises(ValueError, match=f"no usable timeline .*shot 1 .*{value}"):
            outline_of(film, {RECORD_TAG: json.dumps(damaged)}, 16)
    unknown = timeline("x")
    unknown["timeline"]["shots"][0]["prompt"] = None
    assert outline_of(film, {RECORD_TAG: json.dumps(unknown)}, 16).shots[0].prompt == ""
    for text in ("{", "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"'a\.json' beside it is not valid JSON"):
            outline_of(film, {RECORD_TAG: text}, 9)


# --- export --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_films_are_exported_as_vbench_names_them(films, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    single = write_film(folder / "single.mp4", frames_of("red"), timeline(RED))
    write_film(folder / "slash.mp4", frames_of("red"), timeline("red/blue"))
    result = arlon(folder, "--output", tmp_path / "out", "--workers", 1, "--export-vbench", tmp_path / "vbench")
    assert result.exit_code == 1
    assert "slash.mp4: not exported: VBench names videos by their prompt" in result.stderr
    videos = tmp_path / "vbench" / "videos"
    assert sorted(path.name for path in videos.iterdir()) == sorted(
        [*(f"{RED}-{i}.mp4" for i in range(4)), *(f"{BLUE}-{i}.mp4" for i in range(3))]
    )
    info = json.loads((tmp_path / "vbench" / "arlon_full_info.json").read_text())
    assert [entry["prompt_en"] for entry in info] == [RED, BLUE]
    assert info[1]["video_list"] == [f"videos/{BLUE}-{i}.mp4" for i in range(3)]
    assert "subject_consistency" in info[0]["dimension"]
    assert (videos / f"{RED}-3.mp4").read_bytes() == single.read_bytes()
    second = read_video(videos / f"{BLUE}-0.mp4")  # the second shot of a.mp4
    whole = read_video(folder / "a.mp4")
    assert probe(videos / f"{BLUE}-0.mp4").fps == FPS
    errors = [np.abs(second.astype(int) - part.astype(int)).mean() for part in (whole[16:], whole[:16])]
    assert errors[0] < 2 < 4 < errors[1]  # a second encoding rounds colours; the first shot is another picture


def test_an_export_does_not_mix_with_another(films, tmp_path):
    (tmp_path / "vbench" / "videos").mkdir(parents=True)
    (tmp_path / "vbench" / "videos" / "x-0.mp4").touch()
    result = arlon(
        films / "a.mp4", "--output", tmp_path / "out", "--workers", 1, "--export-vbench", tmp_path / "vbench"
    )
    assert result.exit_code == 2
    assert "holds other videos" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_written_among_the_films(tmp_path):
    (tmp_path / "a.mp4").touch()
    result = arlon(tmp_path, "--output", tmp_path / "out", "--export-vbench", tmp_path / "x" / "..")
    assert result.exit_code == 2
    assert "is a folder of the films: name another one as --export-vbench" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


def test_an_export_that_was_killed_or_made_before_is_made_again(films, tmp_path, monkeypatch):
    sources, folder = [films / "a.mp4"], tmp_path / "films" / "vbench"

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vbench_export, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            export_films(sources, folder)
    assert find_films([tmp_path / "films"])[0] == []
    for colour in (RED, BLUE, RED):
        write_film(tmp_path / "take.mp4", frames_of("red"), timeline(colour))
        export_films([*sources, tmp_path / "take.mp4"], folder)
        names = {path.name for path in (folder / "videos").iterdir()}
        assert names == {f"{RED}-0.mp4", f"{BLUE}-0.mp4", f"{colour}-1.mp4"}
        assert names == vbench_export._exported(folder)
    assert find_films([tmp_path / "films"])[0] == []
    assert len(find_films([folder])[0]) == 3
