"""HLS streams (RFC 8216) of films, to watch them while they grow: `--hls`.

    film.hls/film.m3u8      the playlist: byte ranges of the growing film, one a segment
    film.hls/stream.mp4     the growing film under a second name, so that no byte is stored twice while it grows

The playlist is replaced as a whole after every segment and only ever gets longer; it never names bytes that do not
exist yet. It has type EVENT, and ends with ENDLIST when the film is complete. A film that is resumed continues the same
stream. A film that was changed gets a new stream, and its old playlist is removed first.

`stream.mp4` is a hard link. It stays when the film is finished and the growing film is removed, so a finished film
exists twice: seekable and as a stream. On a file system without hard links it is a copy that grows too.
"""

from __future__ import annotations

import os
from contextlib import suppress
from math import ceil
from pathlib import Path

from arlon.files import make_folder, sweep, temporary_beside, write_bytes
from arlon.film.plan import Plan
from pipelines.deliver.paths import FilmOutput

PLAYLIST_NAME = "film.m3u8"
STREAM_NAME = "stream.mp4"
_COPY_CHUNK = 1 << 20


class HlsFolder:
    """Folder with the stream of a growing film.

    Args:
        path: The folder; it is made when the first fragment is published.
        partial: The growing film, which holds the fragments that are added.
        fps: Frames a second.
        longest_s: Seconds of the longest fragment to come, which players must know at the start.
    """

    def __init__(self, path: Path, partial: Path, *, fps: float, longest_s: float) -> None:
        self.path, self.partial, self.fps = path, partial, fps
        self._longest_s = longest_s
        self._lines: list[str] = []
        self._end = 0
        self._is_linked = False
        self._is_there = False

    def add(self, num_frames: int, *, head_bytes: int, end: int) -> None:
        """Add the next fragment; `publish` shows it.

        Args:
            num_frames: Frames in it.
            head_bytes: Bytes of the growing film before its first fragment.
            end: Bytes of the growing film, this fragment included.
        """
        if not self._lines:
            self._lines = [
                "#EXTM3U",
                "#EXT-X-VERSION:7",
                # It must not change while the stream grows, so the longest fragment to come is named at the start.
                f"#EXT-X-TARGETDURATION:{ceil(self._longest_s)}",
                # Fragments are only added, so a player may seek back to the start.
                "#EXT-X-PLAYLIST-TYPE:EVENT",
                "#EXT-X-INDEPENDENT-SEGMENTS",
                f'#EXT-X-MAP:URI="{STREAM_NAME}",BYTERANGE="{head_bytes}@0"',
            ]
            self._end = head_bytes
        self._lines += [
            f"#EXTINF:{num_frames / self.fps:.6f},",
            f"#EXT-X-BYTERANGE:{end - self._end}@{self._end}",
            STREAM_NAME,
        ]
        self._end = end

    def publish(self, *, is_whole: bool) -> None:
        """Write the playlist with the fragments added so far; without any, nothing is written.

        Args:
            is_whole: Whether these are all fragments of the film.
        """
        if not self._lines:
            return
        lines = [*self._lines, "#EXT-X-ENDLIST"] if is_whole else self._lines
        playlist = self.path / PLAYLIST_NAME
        if not self._is_there:
            make_folder(self.path)
            sweep([self.path], (PLAYLIST_NAME, STREAM_NAME))
            # Players keep their place in a playlist that only grows; any other one is a new stream.
            if playlist.exists() and not _goes_on(playlist.read_text(encoding="utf-8", errors="replace"), lines):
                playlist.unlink()
            self._link()
            self._is_there = True
        if not self._is_linked:
            self._copy()
        write_bytes(playlist, ("\n".join(lines) + "\n").encode())

    def _link(self) -> None:
        temporary = temporary_beside(self.path / STREAM_NAME)
        try:
            # A second name for the growing film: the stream then takes no space and no copying.
            os.link(self.partial, temporary)
            self._is_linked = True
        except OSError:
            # A file system without hard links: `_copy` appends what is new.
            temporary.write_bytes(b"")
        temporary.replace(self.path / STREAM_NAME)

    def _copy(self) -> None:
        """Copy what the growing film has gained, up to the end of the last fragment."""
        with self.partial.open("rb") as source, (self.path / STREAM_NAME).open("ab") as target:
            # Copying starts behind what an earlier call copied, and stops before an unfinished fragment.
            left = self._end - source.seek(target.tell())
            while left > 0 and (data := source.read(min(left, _COPY_CHUNK))):
                left -= target.write(data)


def stream_of(plan: Plan, output: FilmOutput) -> HlsFolder | None:
    """The stream of a film; None if it is to have none."""
    if not output.has_stream:
        return None
    longest = max(segment.num_frames for segment in plan.segments)
    return HlsFolder(output.paths.hls, output.paths.partial, fps=plan.fps, longest_s=longest / plan.fps)


def _goes_on(old: str, lines: list[str]) -> bool:
    """Whether the lines of a playlist begin with those of an old one."""
    shown = [line for line in old.splitlines() if line != "#EXT-X-ENDLIST"]
    return lines[: len(shown)] == shown


def remove_stream(path: Path) -> None:
    """Remove a stream, and its folder if nothing else is in it."""
    if not path.is_dir() or path.is_symlink():
        return
    sweep([path], (PLAYLIST_NAME, STREAM_NAME))
    for name in (PLAYLIST_NAME, STREAM_NAME):
        (path / name).unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()
