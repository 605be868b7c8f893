"""Generate an image that follows a control image of a kind that the Union ControlNet knows, such as edges or a pose.

The model is flux.1-dev.
"""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.utils.controlnet import Annotator

controlnet = ModelConfig(
    model_id="InstantX/FLUX.1-dev-Controlnet-Union-alpha", origin_file_pattern="diffusion_pytorch_model.safetensors"
)
pipe = diffsynth.load("flux.1-dev", components={"controlnet": controlnet})
edges = Annotator("canny")(Image.open("photo.jpg"))
image = pipe(
    prompt="a lighthouse in the evening",
    controlnet_inputs=[ControlNetInput(image=edges, processor_id="canny", scale=0.6)],
    seed=0,
)
image.save("lighthouse.jpg")
