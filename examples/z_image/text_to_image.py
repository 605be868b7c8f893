"""Generate an image from a prompt.

z-image-turbo     8 steps, without guidance
z-image           50 steps with guidance; takes a negative prompt
z-image-nano      in the wheel of diffsynth-zimage; generates emoji of 128 x 128 pixels
"""

import diffsynth

pipe = diffsynth.load("z-image-turbo")
image = pipe(prompt="a red panda reading a newspaper", seed=0)
image.save("panda.jpg")

# Another image from the first one: the lower the strength, the more of it is kept.
image = pipe(prompt="a red panda reading a book", input_image=image, denoising_strength=0.7, seed=0)
image.save("panda_with_book.jpg")
