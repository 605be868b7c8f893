"""Generate an image from a prompt.

qwen-image
qwen-image-2512
qwen-image-distill-full     15 steps, without guidance
"""

import diffsynth

pipe = diffsynth.load("qwen-image")
image = pipe(prompt='a shop window with the words "Open today"', negative_prompt="blurred", seed=0)
image.save("shop.jpg")
