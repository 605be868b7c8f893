"""Generate an image in 4 steps, and edit it.

flux.2-klein-4b
flux.2-klein-9b
flux.2-klein-9b-kv      with edit_image_kv_cache=True, reference images cost no time in the steps
"""

import diffsynth

pipe = diffsynth.load("flux.2-klein-4b")
image = pipe(prompt="a girl in a red coat on a bridge", seed=0)
image.save("girl.jpg")

edited = pipe(prompt="turn the red coat into a sweater", edit_image=image, seed=0)
edited.save("girl_with_sweater.jpg")
