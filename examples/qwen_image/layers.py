"""Take an image apart into layers with transparency, which give it again if each is laid over those before it.

qwen-image-layered
qwen-image-layered-control  (computes the one layer that the prompt describes: layer_num=0, its default)

Describe the whole image in the prompt; it is not captioned. `convert` makes an opaque image of any.
"""

from PIL import Image

import diffsynth

pipe = diffsynth.load("qwen-image-layered")
poster = Image.open("poster.png").convert("RGBA")
images = pipe(
    prompt="a child with a balloon on a lawn, and the word 'hello' above",
    layer_input_image=poster,
    layer_num=3,
    height=480,
    width=864,
    seed=0,
)
for number, image in enumerate(images):  # 0 is the poster itself, then its layers from back to front
    image.save(f"layer_{number}.png")
