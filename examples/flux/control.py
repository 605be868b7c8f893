"""Generate an image that follows a depth map, or edges.

flux.1-depth-dev
flux.1-canny-dev
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("flux.1-depth-dev")
image = pipe(prompt="a kitchen of white marble", control_image=Image.open("depth.png"), seed=0)
image.save("kitchen.jpg")
