"""One picture of a whole video, to see at a glance what is in it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def contact_sheet(
    frames: Sequence[Image.Image], *, columns: int = 4, rows: int = 3, width: int = 320, gap: int = 4
) -> Image.Image:
    """Frames at even distances, the first and the last among them, in rows from the top left.

    Only these frames are asked for, in order, so `frames` may be a `VideoData` of any length.

    Args:
        frames: of one shape; one at least.
        columns: side by side.
        rows: below each other; fewer if there are not as many frames.
        width: of each, in pixels; the height follows.
        gap: between them, in pixels.

    Raises:
        ValueError: no frames, or a number that is not positive.
    """
    if not len(frames):
        raise ValueError("0 frames; expected at least one")
    if min(columns, rows, width) < 1 or gap < 0:
        raise ValueError(f"columns={columns}, rows={rows}, width={width}, gap={gap}: expected positive numbers")
    count = min(columns * rows, len(frames))
    columns = min(columns, count)
    chosen = [round(index * (len(frames) - 1) / max(count - 1, 1)) for index in range(count)]
    sheet = None
    for place, index in enumerate(chosen):
        frame = frames[index]
        height = max(round(width * frame.height / frame.width), 1)
        if sheet is None:
            lines = -(-count // columns)
            sheet = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), "black")
        row, column = divmod(place, columns)
        sheet.paste(frame.convert("RGB").resize((width, height)), (column * (width + gap), row * (height + gap)))
    assert sheet is not None
    return sheet
