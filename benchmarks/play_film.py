"""Play a film in a real browser, whole and cut off, and say what the browser saw.

    python -m benchmarks.play_film FILM [--cut 0.4] [--screenshot OUT.png] [--json OUT.json]

FILM is an MP4, growing or finished, or an HLS playlist. A Chromium without a window loads a page with nothing but a
<video> from a file server on the loopback address; the cut-off film is the same file, of which the server gives only
the first part. Chromium is driven through its debugging pipe, so nothing has to be installed but the browser.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from arlon.data.video_io import VideoError, probe
from arlon.files import write_bytes, write_json

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--autoplay-policy=no-user-gesture-required",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-gpu",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
    "--window-size=640,640",
)
PAGE = """<!doctype html><meta charset="utf-8"><title>film</title>
<style>body {{ margin: 0; overflow: hidden; background: #222 }}
video {{ width: 100vw; height: 100vh; image-rendering: pixelated }}</style>
<video muted playsinline preload="auto" src="{source}"></video>"""
PAGE_NAME = "__play__.html"
WATCH = """(async () => {{
  const video = document.querySelector("video"), samples = [], started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  let first = null;
  video.addEventListener("playing", () => first ??= seconds(), {{once: true}});
  video.playbackRate = {rate};
  video.play().catch(() => null);
  let moved = 0;
  while (!video.ended && !video.error && seconds() < {limit_s} && seconds() - moved < {patience_s}) {{
    await new Promise(resolve => setTimeout(resolve, 100));
    if (!samples.length || video.currentTime > samples.at(-1)[1]) {{
      moved = seconds();
      samples.push([moved, video.currentTime]);
    }}
  }}
  const quality = video.getVideoPlaybackQuality();
  return {{
    duration_s: Number.isFinite(video.duration) ? video.duration : null, reached_s: video.currentTime,
    first_s: first, ended: video.ended, error: video.error && video.error.message,
    width: video.videoWidth, height: video.videoHeight, num_frames: quality.totalVideoFrames,
    num_dropped: quality.droppedVideoFrames, num_steps: samples.length, samples,
  }};
}})()"""
LAUNCHER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""
PATIENCE_S = 8.0
"""Seconds that the playing time of a film may stand still before the film counts as stopped."""


# --- the file server -----------------------------------------------------------------------------------------


class FilmHandler(SimpleHTTPRequestHandler):
    """Serves a folder, by byte ranges too, and one of its files only up to a length.

    Args:
        args: Of the base class.
        film: Name of that file.
        length: Its length in bytes.
        kwargs: Of the base class.
    """

    def __init__(self, *args: Any, film: str, length: int, **kwargs: Any) -> None:
        self.film, self.length = film, length
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Answer."""
        path = Path(self.translate_path(self.path))
        if path.name == PAGE_NAME:
            self._send(PAGE.format(source=quote(self.film)).encode(), "text/html")
        elif path.is_file():
            self._send_part(path)
        else:
            self.send_error(404)

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_part(self, path: Path) -> None:
        size = min(self.length, path.stat().st_size) if path.name == self.film else path.stat().st_size
        start, stop = _byte_range(self.headers.get("Range"), size)
        if start >= stop:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Type", "application/vnd.apple.mpegurl" if path.suffix == ".m3u8" else "video/mp4")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        try:
            with path.open("rb") as file:
                file.seek(start)
                while start < stop and (data := file.read(min(stop - start, 1 << 16))):
                    self.wfile.write(data)
                    start += len(data)
        except ConnectionError:  # the browser has seen enough
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _byte_range(header: str | None, size: int) -> tuple[int, int]:
    """First byte, and the one behind the last, of a Range header with one range; the whole file without one."""
    if not header or not header.startswith("bytes="):
        return 0, size
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


@contextmanager
def served(film: Path, length: int) -> Iterator[str]:
    """The address of a page that shows the first `length` bytes of a film."""
    handler = partial(FilmHandler, directory=str(film.parent), film=film.name, length=length)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{PAGE_NAME}"
        finally:
            server.shutdown()
            thread.join()


# --- the browser ---------------------------------------------------------------------------------------------


def find_browser(name: str | None = None) -> str:
    """Path of a Chromium.

    Raises:
        FileNotFoundError: If there is none.
    """
    for candidate in (name,) if name else BROWSERS:
        if path := shutil.which(candidate):
            return path
    raise FileNotFoundError(
        f"no browser: {name or ' nor '.join(BROWSERS)} was found. Install Chromium or Chrome, or name it with --browser"
    )


class Browser:
    """A Chromium without a window, with a profile of its own that goes when it is closed.

    It reads commands from its file descriptor 3 and answers on 4: JSON, each message ended by a zero byte.

    Args:
        path: The program.
    """

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="arlon-browser-", ignore_cleanup_errors=True)
        self._log = Path(self._profile.name) / "log.txt"
        commands, self._commands = _pipe()
        self._answers, answers = _pipe()
        flags = [*FLAGS, f"--user-data-dir={self._profile.name}/profile"]
        if os.geteuid() == 0:  # Chromium's sandbox refuses to run for root
            flags.append("--no-sandbox")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, str(commands), str(answers), path, *flags, "about:blank"],
                pass_fds=(commands, answers),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(commands)
        os.close(answers)
        self._read, self._count = b"", 0

    def call(self, method: str, *, session: str | None = None, timeout_s: float = 60, **params: Any) -> dict[str, Any]:
        """Give a command of the DevTools protocol and return its result.

        Raises:
            RuntimeError: If the browser refuses, ends, or does not answer in time.
        """
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        deadline_s = time.monotonic() + timeout_s
        try:
            os.write(self._commands, json.dumps(message).encode() + b"\0")
            while (answer := self._next_message(deadline_s)).get("id") != self._count:
                pass  # an event, which nobody waits for
        except (OSError, EOFError):
            raise RuntimeError(f"the browser ended: {self._last_words()}") from None
        except TimeoutError:
            raise RuntimeError(f"the browser did not answer {method} within {timeout_s:.0f} s") from None
        if "error" in answer:
            raise RuntimeError(f"the browser refused {method}: {answer['error'].get('message')}")
        return answer["result"]

    def _next_message(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            if not select.select([self._answers], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise TimeoutError
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise EOFError
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def version(self) -> str:
        """Its name and version."""
        return self.call("Browser.getVersion")["product"]

    @contextmanager
    def page(self, url: str) -> Iterator[str]:
        """A session with a page; the page is closed at the end."""
        target = self.call("Target.createTarget", url=url)["targetId"]
        try:
            yield self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        finally:
            self.call("Target.closeTarget", targetId=target)

    def evaluate(self, session: str, script: str, *, timeout_s: float) -> Any:
        """Value of a script, waited for if it is a promise."""
        result = self.call(
            "Runtime.evaluate",
            session=session,
            timeout_s=timeout_s,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"the page failed: {result['exceptionDetails'].get('text')}")
        return result["result"].get("value")

    def close(self) -> None:
        """End the browser and remove its profile."""
        try:
            self.call("Browser.close", timeout_s=10)
            self._process.wait(timeout=10)
        except (RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not among the numbers they will be given in the browser."""
    ends = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return read, write


# --- the measurement -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Playback:
    """Observations of a browser that plays a film."""

    share: float
    """Share of the bytes of the film that the browser was given."""
    duration_s: float | None
    """Length of the film as the browser reports it; None if endless or unknown."""
    reached_s: float
    """Time of the film at which playing stopped."""
    first_s: float | None
    """Seconds until the film began to play; None: never."""
    ended: bool
    """Whether the browser took that for the end."""
    error: str | None
    width: int
    height: int
    num_frames: int
    """Frames decoded."""
    num_dropped: int
    """Decoded frames that were not shown."""
    num_steps: int
    """Times at which the clock of the film was seen to have moved on."""


def play(
    browser: Browser, film: Path, *, share: float = 1.0, rate: float = 1.0, limit_s: float = 120.0
) -> tuple[Playback, bytes]:
    """Play the first part of a film as far as it goes.

    Args:
        browser: Plays it.
        film: The file.
        share: Of its bytes that the browser gets.
        rate: Speed.
        limit_s: Seconds after which it is stopped.

    Returns:
        What was seen, and the last picture as PNG.
    """
    with served(film, int(share * film.stat().st_size)) as url, browser.page(url) as session:
        while not browser.evaluate(session, "!!document.querySelector('video')", timeout_s=30):
            time.sleep(0.05)
        script = WATCH.format(rate=rate, limit_s=limit_s, patience_s=PATIENCE_S)
        seen = browser.evaluate(session, script, timeout_s=limit_s + 30)
        picture = browser.call("Page.captureScreenshot", session=session, format="png")["data"]
    seen.pop("samples")
    return Playback(share=share, **seen), base64.b64decode(picture)


def _line(playback: Playback) -> str:
    times = (playback.duration_s, playback.reached_s, playback.first_s)
    counts = (playback.num_frames, playback.num_dropped, playback.num_steps)
    cells = [f"{playback.share:6.0%}"]
    cells += ["       -" if value is None else f"{value:8.2f}" for value in times]
    cells += [f"{count:8d}" for count in counts]
    return " ".join((*cells, f" {playback.width}x{playback.height} ", playback.error or _end(playback)))


def _end(playback: Playback) -> str:
    return "played to its end" if playback.ended else "waits for more"


def main(argv: Sequence[str] | None = None) -> None:
    """Play."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path, help="an MP4 or an HLS playlist")
    parser.add_argument("--cut", type=float, nargs="*", default=[0.4], help="shares of the file to play as well")
    parser.add_argument("--rate", type=float, default=1.0, help="speed")
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="stop playing after this time")
    parser.add_argument("--browser", help="Chromium or Chrome, if it is not on the path")
    parser.add_argument("--screenshot", type=Path, metavar="OUT.png", help="write the last picture of the whole film")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures")
    args = parser.parse_args(argv)
    if not all(0 < share < 1 for share in args.cut):
        parser.error("--cut needs shares between 0 and 1")
    if not 0.1 <= args.rate <= 16:
        parser.error("--rate must be from 0.1 to 16")
    try:
        info = probe(args.film)
        path = find_browser(args.browser)
        with Browser(path) as browser:
            version = browser.version()
            print(f"{args.film.name}: {info.num_frames} frames, {info.duration_s:.2f} s, {info.codec}; {version}")
            print(" bytes   length  reached   begins   frames  dropped    steps  size")
            results = []
            for share in (1.0, *args.cut):
                playback, picture = play(browser, args.film, share=share, rate=args.rate, limit_s=args.limit)
                results.append(playback)
                print(_line(playback), flush=True)
                if args.screenshot:
                    name = args.screenshot.stem + ("" if share == 1 else f".cut{round(100 * share)}")
                    write_bytes(args.screenshot.with_name(f"{name}.png"), picture)
    except (OSError, RuntimeError, VideoError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_json(args.json, {"browser": version, "playbacks": [asdict(result) for result in results]})
    if not results[0].ended or any(result.reached_s <= 0 for result in results):
        sys.exit("error: the film does not play to its end, or not at all when cut off")


if __name__ == "__main__":
    main()
