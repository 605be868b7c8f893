"""Generate an image with classifier-free guidance, and edit it, with a model that is not distilled.

flux.2-klein-base-4b
flux.2-klein-base-9b
"""

import diffsynth

pipe = diffsynth.load("flux.2-klein-base-4b")
image = pipe(prompt="a girl in a red coat on a bridge", cfg_scale=4.0, seed=0)
image.save("girl.jpg")

edited = pipe(prompt="turn the red coat into a sweater", edit_image=image, cfg_scale=4.0, seed=0)
edited.save("girl_with_sweater.jpg")
