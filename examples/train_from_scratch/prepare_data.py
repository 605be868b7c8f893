"""Render the training set: all named single-codepoint emoji of Noto Color Emoji, on white.

    apt-get install fonts-noto-color-emoji
    python examples/train_from_scratch/prepare_data.py

Writes `data/emoji/images/<codepoint>.png` (128x128), `data/emoji/metadata.csv` (image, prompt) and
`data/emoji/source.json` (the font's file, version and checksum).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109
"""Size of the font's bitmaps; the font has no other."""
CANVAS = 136
"""Side in pixels of a square that contains a bitmap of 136x128 pixels."""
EMOJI_BLOCKS = ((0x203C, 0x3300), (0x1F000, 0x1FB00))
"""Unicode blocks with emoji; digits and letters before them are parts of keycap sequences, not emoji."""


def main() -> None:
    """Render the dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--output", type=Path, default=Path("data/emoji"))
    parser.add_argument("--size", type=int, default=128)
    arguments = parser.parse_args()

    font = ImageFont.truetype(str(arguments.font), STRIKE)
    folder = arguments.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for codepoint in (c for first, last in EMOJI_BLOCKS for c in range(first, last)):
        name = unicodedata.name(chr(codepoint), "").lower()
        image = render(chr(codepoint), font, arguments.size) if name else None
        if image is None:
            continue
        path = folder / f"{codepoint:05x}.png"
        image.save(path)
        rows.append((f"images/{path.name}", name))
    with (arguments.output / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "prompt"))
        writer.writerows(rows)
    source = {
        "font": arguments.font.name,
        "version": font_version(arguments.font),
        "sha256": hashlib.sha256(arguments.font.read_bytes()).hexdigest(),
        "license": "OFL-1.1",
        "images": len(rows),
        "size": arguments.size,
        "unicode": unicodedata.unidata_version,
    }
    (arguments.output / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(source, indent=2))


def render(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """Return the emoji centered on a white square; None if the font has no bitmap for it."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((CANVAS // 2, CANVAS // 2), character, font=font, embedded_color=True, anchor="mm")
    box = canvas.getchannel("A").getbbox()
    if box is None or font.getmask(character, mode="RGBA").size == (0, 0):
        return None
    # Center the bitmap itself: with the font's anchor, some are cut off at the bottom.
    image = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 255))
    cut = canvas.crop(box)
    image.alpha_composite(cut, ((CANVAS - cut.width) // 2, (CANVAS - cut.height) // 2))
    return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def font_version(path: Path) -> str:
    """Return the version in the font's name table, read without a font library."""
    data = path.read_bytes()
    tables = {data[12 + 16 * i : 16 + 16 * i]: 12 + 16 * i for i in range(int.from_bytes(data[4:6], "big"))}
    start = int.from_bytes(data[tables[b"name"] + 8 : tables[b"name"] + 12], "big")
    strings = start + int.from_bytes(data[start + 4 : start + 6], "big")
    for i in range(int.from_bytes(data[start + 2 : start + 4], "big")):
        record = data[start + 6 + 12 * i : start + 18 + 12 * i]
        platform, name = int.from_bytes(record[0:2], "big"), int.from_bytes(record[6:8], "big")
        length, offset = int.from_bytes(record[8:10], "big"), int.from_bytes(record[10:12], "big")
        if name == 5:
            text = data[strings + offset : strings + offset + length]
            return text.decode("utf-16-be" if platform in (0, 3) else "latin-1")
    return "unknown"


if __name__ == "__main__":
    main()
