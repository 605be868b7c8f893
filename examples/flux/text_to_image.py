"""Generate an image from a prompt.

flux.1-dev
flux.1-krea-dev
flux.1-schnell      4 steps; takes no embedded_guidance
"""

import diffsynth

pipe = diffsynth.load("flux.1-dev")
image = pipe(prompt="a red panda reading a newspaper", embedded_guidance=3.5, seed=0)
image.save("panda.jpg")

# With a negative prompt, each step runs the network twice.
image = pipe(prompt="a red panda reading a newspaper", negative_prompt="blurred", cfg_scale=2.0, seed=0)
image.save("panda_guided.jpg")
