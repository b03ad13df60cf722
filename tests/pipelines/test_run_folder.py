from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipelines.store.run_folder import RunFolder, RunFolderError, hash_tensor, write_bytes


def committed(folder: RunFolder, index: int = 7) -> torch.Tensor:
    latent = torch.randn(1, 4, 10, 3, 5)
    folder.commit_segment(index, latent=latent, fragment=b"frames", inputs={"prompt": "a", "seed": 3})
    return latent


def test_segment_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start({"seed": 3})
    assert not folder.has_segment(7)
    latent = committed(folder)
    assert folder.has_segment(7)
    assert {f.name for f in folder.segment_dir(7).iterdir()} == {
        "latents.safetensors",
        "fragment.mp4",
        "segment.json",
    }
    torch.testing.assert_close(folder.read_latent(7), latent, rtol=0, atol=0)
    record = folder.read_segment(7)
    assert record.inputs == {"prompt": "a", "seed": 3}
    assert (tmp_path / "run" / "segments" / "0007" / "fragment.mp4").read_bytes() == b"frames"


@pytest.mark.parametrize("name", ["latents.safetensors", "fragment.mp4"])
def test_changed_files_are_found(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    committed(folder)
    path = folder.segment_dir(7) / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=f"{name}.*differs from its record"):
        folder.read_segment(7)
    folder.read_segment(7, verify=False)


def test_a_segment_without_its_record_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    committed(folder)
    (folder.segment_dir(7) / "segment.json").unlink()
    assert not folder.has_segment(7)
    with pytest.raises(FileNotFoundError, match=r"no segment\.json"):
        folder.read_segment(7)


def test_record_is_written_after_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure between any two writes leaves no committed segment, and a sweep leaves nothing of it."""
    import arlon.files as module

    publish = module.publish
    for survived in range(3):
        folder = RunFolder(tmp_path / str(survived))
        calls = iter(range(3))

        def failing(temporary: Path, path: Path, calls: object = calls, survived: int = survived) -> None:
            if next(calls) == survived:
                raise OSError("disk full")
            publish(temporary, path)

        monkeypatch.setattr(module, "publish", failing)
        with pytest.raises(OSError, match="disk full"):
            committed(folder)
        assert not folder.has_segment(7)
        folder.sweep()
        assert not folder.segment_dir(7).exists()


def test_codes_of_all_takes_come_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    codes = {take: torch.randint(0, 9000, (1, 5 + take, 2, 3)) for take in (0, 1, 11)}
    folder.write_codes(codes)
    read = folder.read_codes()
    assert list(read) == [0, 1, 11]
    for take, expected in codes.items():
        assert read[take].dtype == torch.int64
        assert read[take].equal(expected)


def test_a_new_run_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    folder.start({"seed": 1})
    committed(folder)
    folder.log("segment", index=7)
    folder.start({"seed": 2})
    assert folder.read_run()["seed"] == 2
    assert not folder.has_segment(7)
    assert {f.name for f in tmp_path.iterdir()} == {"mine.txt", "run.json"}


def test_a_run_in_the_working_directory_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(".")
    folder.start({})
    folder.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "mine.txt").write_text("keep")
    RunFolder(tmp_path).discard()
    RunFolder(tmp_path).start({})
    assert (tmp_path / "segments" / "mine.txt").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match="not valid JSON"):
        folder.read_run()
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunFolderError, match="format 2"):
        folder.read_run()
    (tmp_path / "codes.safetensors").write_bytes(b"short")
    with pytest.raises(RunFolderError, match="damaged or cut off"):
        folder.read_codes()


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.mkdir()
    with pytest.raises(OSError):  # noqa: PT011 (the message is the system's)
        write_bytes(target, b"data")
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log("codes", takes=2)
    folder.log("segment", index=0)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["codes", "segment"]


def test_tensor_hash_sees_content_shape_and_type() -> None:
    x = torch.arange(6.0)
    hashes = {hash_tensor(y) for y in (x, x.view(2, 3), x.double(), x + 1, torch.empty(0))}
    assert len(hashes) == 5
    assert hash_tensor(x.view(2, 3).t().contiguous().t()) == hash_tensor(x.view(2, 3))
