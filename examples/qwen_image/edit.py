"""Edit an image by an instruction.

qwen-image-edit
firered-image-edit-1.0
firered-image-edit-1.1
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("qwen-image-edit")
image = pipe(prompt="give the cat a straw hat", edit_image=Image.open("cat.jpg"), seed=0)
image.save("cat_with_hat.jpg")
