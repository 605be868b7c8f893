"""Generate an image that follows a control image, such as edges, soft edges, depth or a pose.

The ControlNet by InstantX is for qwen-image; it is not told the kind of the image.
"""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput

controlnet = ModelConfig(
    model_id="InstantX/Qwen-Image-ControlNet-Union", origin_file_pattern="diffusion_pytorch_model.safetensors"
)
pipe = diffsynth.load("qwen-image", components={"controlnet": controlnet})
image = pipe(
    prompt="a lighthouse in the evening",
    controlnet_inputs=[ControlNetInput(image=Image.open("pose.png"), scale=0.9)],
    guidance="token_norm",
    seed=0,
)
image.save("lighthouse.jpg")
