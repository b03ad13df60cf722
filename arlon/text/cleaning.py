"""Caption cleaning as the released Open-Sora v1.2 was trained with.

Source: Open-Sora v1.2, `text_preprocessing`: the caption clean-up of DeepFloyd IF, applied twice. It lowers
the text and removes what scraped captions carry (addresses, markup, handles, file names, codes, sizes).
It also deletes Chinese characters and figures such as 1920x1080, so it belongs to models trained with it.

Departure: file formats (`png`, `mp4` ...) are removed as whole words only; the original also cuts them out of
longer words.
"""

from __future__ import annotations

import html
import re
import urllib.parse

_FORMATS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = "\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
_WIDE_DASHES = "\ufe31\ufe32\ufe58\ufe63\uff0d"
_BAD_PUNCTUATION = r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+"

# In order: a rule relies on what the ones before it have removed.
_ADDRESSES = (
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)
_SYMBOLS = (
    (r"@\w+\b", ""),
    # CJK strokes, phonetic extensions, enclosed letters, compatibility, extension A, hexagrams, ideographs.
    ("[\u31c0-\u9fff]+", ""),
    (rf"[-{_DASHES}{_WIDE_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FORMATS})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (_BAD_PUNCTUATION, " "),
    (r"\s+\.\s+", " "),
)
_PHRASES = (
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-z]+\d+[a-z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-z]+\d+\b", ""),  # 4k60
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FORMATS})(?:\simages?)?\b", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),  # j2d1a2
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # Latin x, Cyrillic kha, times sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_EDGES = (
    (r"^[\"'](?s:(.+))[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINTS = re.compile(r"[-_]")
MAX_JOINTS = 3
"""More hyphens or underscores than this make a name-like-this-one that is split into words."""


def clean_caption(text: str) -> str:
    """Clean a caption for an encoder of Open-Sora v1.2; the result may be empty.

    Args:
        text: Any text, such as `Visit https://a.com/b: A <b>BIG</b> dog`.

    Returns:
        Lower-case text without what the module names, such as `visit a big dog`.
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = urllib.parse.unquote_plus(str(text)).strip().lower().replace("<person>", "person")
    text = _visible_text(_apply(_ADDRESSES, text))
    text = _apply(_SYMBOLS, text)
    if len(_JOINTS.findall(text)) > MAX_JOINTS:
        text = _JOINTS.sub(" ", text)
    return _apply(_EDGES, _apply(_PHRASES, _repair(text))).strip()


def _visible_text(text: str) -> str:
    """Text of an HTML fragment; text without markup is returned unchanged."""
    if "<" not in text and "&" not in text:
        return text
    from bs4 import BeautifulSoup

    return BeautifulSoup(text, features="html.parser").text


def _repair(text: str) -> str:
    """Mend wrongly decoded text, and entities that were escaped twice."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _apply(rules: tuple[tuple[str, str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
