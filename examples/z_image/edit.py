"""Edit an image, or combine several, by an instruction.

z-image-omni-base
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("z-image-omni-base")
cat = Image.open("cat.jpg")
image = pipe(prompt="give the cat a straw hat", edit_image=cat, seed=0)
image.save("cat_with_hat.jpg")

image = pipe(prompt="the cat of image 1 wears the hat of image 2", edit_image=[cat, Image.open("hat.jpg")], seed=0)
image.save("cat_with_that_hat.jpg")
