"""Vary an image, with or without a prompt.

flux.1-redux-dev
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("flux.1-redux-dev")
image = pipe(flux_redux_image=Image.open("cat.jpg"), seed=0)
image.save("another_cat.jpg")
