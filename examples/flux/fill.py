"""Replace the part of an image where a mask is white.

flux.1-fill-dev
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("flux.1-fill-dev")
image = pipe(
    prompt="a vase of tulips on the table",
    flux_fill_image=Image.open("table.jpg"),
    flux_fill_mask=Image.open("mask.png"),
    height=1024,
    width=768,
    seed=0,
)
image.save("table_with_tulips.jpg")
