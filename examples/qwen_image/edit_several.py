"""Combine several images by an instruction, which mentions them by number.

qwen-image-edit-2509
qwen-image-edit-2511
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("qwen-image-edit-2511")
images = [Image.open("cat.jpg"), Image.open("hat.jpg")]
image = pipe(prompt="the cat of image 1 wears the hat of image 2", edit_image=images, seed=0)
image.save("cat_with_that_hat.jpg")
