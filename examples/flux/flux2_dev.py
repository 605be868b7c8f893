"""Generate an image from a prompt, and edit it, with up to ten reference images.

flux.2-dev      32B, and a text encoder of 24B: with vram_limit=24 in load(), blocks are copied while others compute
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("flux.2-dev")
image = pipe(prompt="a girl in a red coat on a bridge", embedded_guidance=2.5, seed=0)
image.save("girl.jpg")

edited = pipe(prompt="her coat is like that of image 2", edit_image=[image, Image.open("coat.jpg")], seed=0)
edited.save("girl_with_that_coat.jpg")
