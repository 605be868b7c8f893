"""Generate an image that resembles another one.

flux.1-dev-ip-adapter
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("flux.1-dev-ip-adapter")
image = pipe(
    prompt="a cat in a garden",
    ipadapter_images=[Image.open("cat.jpg")],
    ipadapter_scale=0.7,
    height=1280,
    width=960,
    seed=0,
)
image.save("cat_in_garden.jpg")
