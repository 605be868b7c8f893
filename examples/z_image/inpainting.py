"""Change the part of an image that is white in a mask.

The model is z-image-turbo; any Z-Image model inpaints.
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("z-image-turbo")
photo, mask = Image.open("park.jpg"), Image.open("bench_mask.png")
image = pipe(prompt="a fountain in a park", input_image=photo, inpaint_mask=mask, denoising_strength=0.9, seed=0)
image.save("fountain.jpg")
