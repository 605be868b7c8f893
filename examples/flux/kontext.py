"""Change an image, or combine several, by an instruction.

flux.1-kontext-dev
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("flux.1-kontext-dev")
photo = Image.open("cat.jpg")
image = pipe(prompt="give the cat a straw hat", kontext_images=photo, seed=0)
image.save("cat_with_hat.jpg")

image = pipe(prompt="the cat wears this hat", kontext_images=[photo, Image.open("hat.jpg")], seed=0)
image.save("cat_with_that_hat.jpg")
