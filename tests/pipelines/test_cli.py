"""The command line as its users meet it: output, exit codes, one readable message and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from arlon.data.video_io import probe
from pipelines.cli import app
from pipelines.commands.options import FilmOptions

ROOT = Path(__file__).parents[2]


def arlon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_writes_a_film_and_prints_where(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    result = arlon(
        *("generate", "--model", tiny_model, "--prompt", "a red circle", "--prompt", "a blue square"),
        *(
            "--duration",
            "51f",
            "--transition",
            "cut",
            "--seed",
            11,
            "--threads",
            1,
            "--output",
            output,
            "--sheet",
        ),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == [str(output), str(output.with_suffix(".png"))]
    assert "seed 11" in result.stderr
    assert "segment 2/2" in result.stderr
    assert probe(output).num_frames == 102
    again = arlon("generate", "--model", tiny_model, "--prompt", "a", "--output", output)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_generate_reads_storyboard_options_and_settings(tiny_model: Path, tmp_path: Path) -> None:
    board = tmp_path / "film.yaml"
    board.write_text("seed: 3\nfps: 12\nshots: [{prompt: a red circle, duration: 51f}]\n")
    result = arlon(
        *("generate", "--model", tiny_model, "--storyboard", board, "--fps", 10, "--threads", 1, "--json"),
        *("--set", "num_inference_steps=1", "--set", "ar_top_p=0.5", "--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.stderr
    film = json.loads(result.stdout)
    assert (film["seed"], film["num_frames"]) == (3, 51)
    record = json.loads(Path(film["sidecar"]).read_text())
    assert record["storyboard"]["fps"] == 10.0
    assert record["storyboard"]["num_inference_steps"] == 1
    assert record["settings"]["ar_top_p"] == 0.5


def test_plan_prints_the_timeline(tiny_model: Path) -> None:
    arguments = ("plan", "--model", tiny_model, "--prompt", "a red circle", "--prompt", "b", "--seed", 5)
    result = arlon(*arguments, "--duration", 6)
    assert result.exit_code == 0, result.stderr
    for text in ("0-50", "51-84", "+0.38 s", "85 frames", "seed 5"):
        assert text in result.stdout
    plan = json.loads(arlon(*arguments, "--json").stdout)
    assert plan["num_frames"] == 85
    assert [segment["overlap"] for segment in plan["segments"]] == [0, 5]


def test_plan_of_a_long_film_is_shortened(tiny_model: Path, tmp_path: Path) -> None:
    board = tmp_path / "long.json"
    board.write_text(json.dumps({"seed": 5, "shots": [{"prompt": f"scene {i}", "duration": 5} for i in range(1, 46)]}))
    command = ("plan", "--model", tiny_model, "--storyboard", board)

    def shown(*options: str) -> list[str]:
        result = arlon(*command, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout.splitlines()

    def scenes(lines: list[str]) -> list[str]:
        return [line.split()[-1] for line in lines if " scene " in line]

    short, whole = shown(), shown("--all")
    assert scenes(short) == [*map(str, range(1, 21)), *map(str, range(36, 46))]
    assert short[21].split() == ["...", "15", "more", "shots,", "shown", "with", "--all"]
    assert scenes(whole) == [*map(str, range(1, 46))]
    sums = "45 shots, 1547 frames, 193.38 s at 8 fps (-31.62 s by rounding)"  # 51 frames and 44 x 34, for 45 x 40
    assert all(sums in " ".join(lines) for lines in (short, whole))
    assert len(json.loads("\n".join(shown("--json")))["shots"]) == 45


def test_plan_prints_a_film_that_is_just_not_long(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [part for i in range(30) for part in ("--prompt", f"scene {i}")]
    lines = arlon("plan", "--model", tiny_model, *prompts).stdout.splitlines()
    assert sum(" scene " in line for line in lines) == 30
    assert not any("--all" in line for line in lines)


def test_sheet_is_written_beside_the_film(tiny_model: Path, tmp_path: Path) -> None:
    arlon("generate", "--model", tiny_model, "--prompt", "a", "--threads", 1, "--output", tmp_path)
    for source in (tmp_path, tmp_path / "film.mp4"):
        result = arlon("sheet", source, "--columns", 3)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.strip() == str(tmp_path / "film.png")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no prompt: give --prompt"),
        (("--prompt", ""), 2, "shots[0].prompt is empty"),
        (("--prompt", "a", "--duration", "0"), 2, "--duration must be more than 0, got '0'"),
        (("--prompt", "a", "--duration", "99999"), 2, "at most one hour"),
        (("--prompt", "a", "--height", "33"), 2, "nearest are 32 and 34"),
        (("--prompt", "a", "--storyboard", "b.yaml"), 2, "either --storyboard or --prompt"),
        (("--storyboard", "none.yaml"), 2, "none.yaml': cannot be read"),
        (("--prompt", "a", "--set", "gudance_scale=2"), 2, "did you mean 'guidance_scale'?"),
        (("--prompt", "a", "--set", "crf"), 2, "--set needs KEY=VALUE"),
        (("--prompt", "a", "--set", "crf=[1"), 2, "cannot read the value"),
        (("--prompt", "a", "--set", "crf="), 2, "--set crf: no value given"),
        (("--prompt", "a", "--model", ""), 2, "unknown model ''"),
        (("--prompt", "a", "--model", "\x1b[2Jx"), 2, "unknown model '\\x1b[2Jx'"),
        (("--prompt", "a", "--output", "file/\x1b[2J.mp4"), 1, "cannot write to 'file/\\x1b[2J.run'"),
        (("--prompt", "a", "--model", "shaped"), 2, "did you mean 'shapes'?"),
        (("--prompt", "a", "--address", "1.2.3.4:5"), 2, "--address needs --executor ray"),
        (("--prompt", "a", "--seed", "-5"), 2, "seed must be between -1 and"),
        (("--prompt", "a", "--unknown"), 2, "--unknown"),
        (("--prompt", "a", "--output", "a.avi"), 2, "a.mp4"),
        (("--prompt", "a", "--output", "file/x.mp4"), 1, "cannot write to"),
    ],
)
def test_wrong_usage_is_one_readable_message(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    result = arlon("generate", "--model", tiny_model, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_truncated_checkpoint_fails_with_its_name(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for part in tiny_model.iterdir():
        (model / part.name).symlink_to(part)
    (model / "dit").unlink()
    (model / "dit").mkdir()
    for file in (tiny_model / "dit").iterdir():
        (model / "dit" / file.name).write_bytes(file.read_bytes()[:200])
    result = arlon("generate", "--model", model, "--prompt", "a", "--output", tmp_path / "a.mp4")
    assert result.exit_code == 1
    assert "dit" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "a.mp4").exists()


def test_files_that_are_no_video_have_no_sheet(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("text")
    result = arlon("sheet", tmp_path / "a.mp4")
    assert result.exit_code == 1
    assert "as video" in result.stderr
    assert arlon("sheet", tmp_path / "none.mp4").exit_code == 1


def test_interruption_has_its_exit_code_and_says_what_is_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.commands import generate as cli

    monkeypatch.setattr(cli, "progress_line", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    result = arlon("generate", "--model", tiny_model, "--prompt", "a", "--threads", 1, "--output", tmp_path / "a.mp4")
    assert result.exit_code == 130
    assert "interrupted after 1 of 1 segments" in result.stderr
    assert str(tmp_path / "a.partial.mp4") in result.stderr
    assert (tmp_path / "a.partial.mp4").exists()
    assert not (tmp_path / "a.mp4").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pipelines.cli import app; from typer.main import get_command; get_command(app);"
        "heavy = {'torch', 'numpy', 'av', 'ray', 'transformers', 'rich', 'yaml', 'PIL'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_options_of_a_group_stand_where_the_group_does() -> None:
    names = [parameter.name for parameter in get_command(app).commands["generate"].params]
    group = [field.name for field in fields(FilmOptions)]
    assert names[: len(group) + 2] == [*group, "output", "overwrite"]


def test_version_and_help_answer() -> None:
    assert arlon("--version").stdout.startswith("arlon ")
    text = arlon("--help").stdout
    assert all(command in text for command in ("generate", "plan", "sheet"))
