"""Draw the training set: every single-codepoint emoji of Noto Color Emoji that has a Unicode name, on white.

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
"""The only size that the font's bitmaps have."""
CANVAS = 136
"""Side of the square that a bitmap of 136x128 pixels fits into."""
EMOJI_BLOCKS = ((0x203C, 0x3300), (0x1F000, 0x1FB00))
"""Where emoji live; digits and letters before them are parts of keycap sequences, not pictures of their own."""


def main() -> None:
    """Draw the set."""
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
        picture = draw(chr(codepoint), font, arguments.size) if name else None
        if picture is None:
            continue
        path = folder / f"{codepoint:05x}.png"
        picture.save(path)
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
        "pictures": len(rows),
        "size": arguments.size,
        "unicode": unicodedata.unidata_version,
    }
    (arguments.output / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(source, indent=2))


def draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """The emoji in the middle of a white square; None where the font has no picture for it."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((CANVAS // 2, CANVAS // 2), character, font=font, embedded_color=True, anchor="mm")
    box = canvas.getchannel("A").getbbox()
    if box is None or font.getmask(character, mode="RGBA").size == (0, 0):
        return None
    # Flush against the middle: the font's own anchor leaves some pictures cut at the bottom.
    picture = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 255))
    cut = canvas.crop(box)
    picture.alpha_composite(cut, ((CANVAS - cut.width) // 2, (CANVAS - cut.height) // 2))
    return picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def font_version(path: Path) -> str:
    """What the font's name table says of its version, without a font library."""
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
