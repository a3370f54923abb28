"""What an attacker sends: the inputs of ../shared/faults/make.py, where it is there, and markup in every language."""

import io
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

MAKE = ROOT.parent / "shared/faults/make.py"


def write_faults(folder: Path) -> None:
    """Write damaged and dangerous files; skip the test where the program that writes them is absent."""
    if not MAKE.is_file():
        pytest.skip(f"{MAKE} is not here")
    subprocess.run([sys.executable, str(MAKE), str(folder)], check=True, capture_output=True)


def png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A black PNG, written row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row, packer = bytes(1 + (width * samples * depth + 7) // 8), zlib.compressobj(1)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(tags: dict[int, int | tuple[int, ...]], data: bytes = b"") -> bytes:
    """A little-endian TIFF of these tags; the pixels begin at byte 8."""
    place, more, entries = 8 + len(data), b"", b""
    after = place + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            packed, more = struct.pack("<I", after + len(more)), more + packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, place) + data + directory + more


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats one of its scans."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True)
    head, first, second, *others = re.split(rb"(?=\xff\xda)", buffer.getvalue())
    return head + first + second * (scans + 1 - len(others) - 1) + b"".join(others)


# Names that are markup somewhere, each with a word that must be seen.
NAMES = (
    "[red]bold[/red]",
    "[/]closed",
    "[link=http://127.0.0.1:9/]rich[/link]",
    "<img src=http://127.0.0.1:9/pixel>",
    "<script>fetch('http://127.0.0.1:9/')</script>",
    "<meta http-equiv=refresh content=0>",
    '"><svg onload=alert(1)>',
    "&lt;b&gt;entity",
    "![beacon](http://127.0.0.1:9/x.png)",
    "](http://127.0.0.1:9/) link",
    "`code` **strong** | cell | # title",
    "=1+1 formula",
    "${jndi} $formula$",
    "a\nline",
    "\x1b[2J\x1b]0;title\x07escape",
    "evil\u202egnp.exe",
)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def elements(html: str) -> _Tags:
    """What a browser makes of a page: its tags, counted, the names of their attributes, and its text."""
    parser = _Tags()
    parser.feed(html)
    return parser
