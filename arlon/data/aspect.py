"""Frame sizes by name: resolutions, aspects and lengths of Open-Sora v1.2, and sizes a VAE cannot make exactly.

An aspect is written height:width, as in the released configs: "9:16" is landscape, "16:9" is portrait. Resolutions are
budgets of pixels; every one has a table of sizes by ratio, height / width. `SIZE_TABLES` are also the buckets that
training clips are sorted into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arlon.errors import did_you_mean
from arlon.grids import ceil_div

Sizes = Mapping[str, tuple[int, int]]
"""Ratio, such as "0.56" -> (height, width) in pixels."""

PIXEL_BUDGETS = {
    "144p": 36_864,
    "256": 65_536,
    "240p": 102_240,
    "360p": 230_400,
    "512": 262_144,
    "480p": 409_920,
    "720p": 921_600,
    "1024": 1_048_576,
    "1080p": 2_073_600,
    "2k": 3_686_400,
    "2048": 4_194_304,
    "2880": 8_294_400,
    "4k": 8_294_400,
}
"""Pixels of a frame, by name of the resolution."""

NUM_FRAMES = {
    "1x": 51,
    "2x": 102,
    "4x": 204,
    "8x": 408,
    "16x": 816,
    "2s": 51,
    "4s": 102,
    "8s": 204,
    "16s": 408,
    "32s": 816,
}
"""Frames of a clip, by name of its length; the seconds are meant at about 25 frames a second."""

ASPECTS = {
    "3:8": "0.38",
    "9:21": "0.43",
    "12:25": "0.48",
    "1:2": "0.50",
    "9:17": "0.53",
    "27:50": "0.54",
    "9:16": "0.56",
    "5:8": "0.62",
    "2:3": "0.67",
    "3:4": "0.75",
    "1:1": "1.00",
    "4:3": "1.33",
    "3:2": "1.50",
    "16:9": "1.78",
    "17:9": "1.89",
    "2:1": "2.00",
    "50:27": "2.08",  # the released name; its sizes are 25:12
}
"""Ratio by name of the aspect, for the resolutions whose names end in p or k."""

ASPECT_WORDS = {"landscape": "9:16", "portrait": "16:9", "square": "1:1"}

# One size for every ratio of ASPECTS, in its order.
_SIZES_BY_ASPECT = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 "
    "256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 "
    "426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 "
    "640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 "
    "854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
    "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
    "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 "
    "1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 "
    "2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}

# The numeric resolutions: ratio, then rows x columns of square blocks; `_BLOCK_SIZES` says how many pixels one has.
_BLOCKS = (
    "0.25:8x32 0.26:8x31 0.27:8x30 0.28:8x29 0.32:9x28 0.33:9x27 0.35:9x26 0.4:10x25 0.42:10x24 0.48:11x23 0.5:11x22 "
    "0.52:11x21 0.57:12x21 0.6:12x20 0.68:13x19 0.72:13x18 0.78:14x18 0.82:14x17 0.88:15x17 0.94:15x16 1.0:16x16 "
    "1.07:16x15 1.13:17x15 1.21:17x14 1.29:18x14 1.38:18x13 1.46:19x13 1.67:20x12 1.75:21x12 2.0:22x11 2.09:23x11 "
    "2.4:24x10 2.5:25x10 2.89:26x9 3.0:27x9 3.11:28x9 3.62:29x8 3.75:30x8 3.88:31x8 4.0:32x8"
)
_BLOCKS_2880 = (
    "0.25:22x90 0.26:22x87 0.27:22x84 0.28:22x81 0.32:25x78 0.33:25x75 0.34:25x73 0.4:28x70 0.42:28x67 0.47:30x64 "
    "0.49:30x61 0.51:30x59 0.55:33x60 0.59:33x56 0.68:36x53 0.72:36x50 0.78:39x50 0.83:39x47 0.89:42x47 0.93:42x45 "
    "1.0:45x45 1.07:45x42 1.12:47x42 1.21:47x39 1.28:50x39 1.39:50x36 1.47:53x36 1.7:56x33 1.82:60x33 2.03:61x30 "
    "2.13:64x30 2.39:67x28 2.5:70x28 2.92:73x25 3.0:75x25 3.12:78x25 3.68:81x22 3.82:84x22 3.95:87x22 4.0:90x22"
)
_BLOCK_SIZES = {"256": (_BLOCKS, 16), "512": (_BLOCKS, 32), "1024": (_BLOCKS, 64), "2048": (_BLOCKS, 128)}
_BLOCK_SIZES["2880"] = (_BLOCKS_2880, 64)


def _size(text: str, scale: int = 1) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height) * scale, int(width) * scale


def _table(resolution: str) -> Sizes:
    if resolution in _SIZES_BY_ASPECT:
        sizes = map(_size, _SIZES_BY_ASPECT[resolution].split())
        return dict(zip(ASPECTS.values(), sizes, strict=True))
    blocks, pixels = _BLOCK_SIZES[resolution]
    pairs = (entry.split(":") for entry in blocks.split())
    return {ratio: _size(size, pixels) for ratio, size in pairs}


SIZE_TABLES: Mapping[str, Sizes] = {resolution: _table(resolution) for resolution in PIXEL_BUDGETS}
"""Sizes (height, width) in pixels, by resolution and ratio."""


def frame_size(resolution: str, aspect: str) -> tuple[int, int]:
    """Size of a frame by name.

    Args:
        resolution: A name of `PIXEL_BUDGETS`, such as "480p".
        aspect: A name of `ASPECTS` (height:width), "landscape", "portrait" or "square", or any other height:width,
            which gets the nearest ratio of the table.

    Returns:
        (height, width) in pixels; ("480p", "9:16") is (480, 854).

    Raises:
        ValueError: If a name is unknown, or the table has no ratio like it.
    """
    sizes = _sizes(resolution)
    name = ASPECT_WORDS.get(aspect, aspect)
    if ASPECTS.get(name) in sizes:
        return sizes[ASPECTS[name]]
    ratio = _parse_aspect(name)
    lowest, highest = (bound(map(float, sizes)) for bound in (min, max))
    # Ratios are names rounded to two digits.
    if not lowest - 0.01 <= ratio <= highest + 0.01:
        raise ValueError(
            f"aspect {aspect!r} is height / width = {ratio:.2f}, but {resolution} has {lowest:.2f} to {highest:.2f}: "
            "choose another aspect, or give height and width"
        )
    return sizes[_nearest(ratio, sizes)]


def _nearest(ratio: float, sizes: Sizes) -> str:
    return min(sizes, key=lambda key: abs(float(key) - ratio))


def _sizes(resolution: str) -> Sizes:
    if resolution not in SIZE_TABLES:
        raise ValueError(f"unknown resolution {resolution!r}, {did_you_mean(resolution, SIZE_TABLES)}")
    return SIZE_TABLES[resolution]


def aspect_ratio(aspect: str) -> float:
    """Height / width of an aspect: a name of `ASPECTS`, "landscape", "portrait", "square", or any height:width.

    Raises:
        ValueError: If it is none of these.
    """
    return _parse_aspect(ASPECT_WORDS.get(aspect, aspect))


def _parse_aspect(aspect: str) -> float:
    try:
        height, width = map(float, aspect.split(":"))
        if not (height > 0 and width > 0):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"unknown aspect {aspect!r}: give height:width such as 9:16, or {did_you_mean(aspect, ASPECT_WORDS)}"
        ) from None
    return height / width


@dataclass(frozen=True, kw_only=True)
class FrameCrop:
    """A frame size that was asked for, and the one that is made and then cut to it. Pixels."""

    height: int
    width: int
    made_height: int
    made_width: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing is cut."""
        return (self.height, self.width) == (self.made_height, self.made_width)

    def describe(self) -> str:
        """Scaling and cropping in words, for people."""
        wanted = f"{self.width} x {self.height}"
        if self.is_exact:
            return wanted
        return f"made at {self.made_width} x {self.made_height}, cut to {wanted} (width x height)"


def fit_frame(height: int, width: int, multiple: int) -> FrameCrop:
    """Plan for frames whose size is not a multiple of what the model can make: make larger ones, then crop.

    Open-Sora v1.2 rounds down instead and delivers less than was asked for: 854 x 480 comes out as 848 x 480.

    Args:
        height: Wanted, pixels.
        width: Wanted, pixels.
        multiple: Pixels of what the model works in: a patch of latents (16 for the released model).

    Raises:
        ValueError: If a size or the multiple is not positive.
    """
    if min(height, width, multiple) < 1:
        raise ValueError(f"height, width and multiple must be positive, got {height}, {width} and {multiple}")
    return FrameCrop(
        height=height,
        width=width,
        made_height=ceil_div(height, multiple) * multiple,
        made_width=ceil_div(width, multiple) * multiple,
    )
