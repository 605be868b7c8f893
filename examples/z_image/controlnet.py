"""Generate an image that follows a control image, such as edges, depth or a pose, with a ControlNet.

The model is z-image-turbo.
"""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.utils.controlnet import Annotator

controlnet = ModelConfig(
    model_id="PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
    origin_file_pattern="Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps.safetensors",
)
pipe = diffsynth.load("z-image-turbo", components={"controlnet": controlnet})
edges = Annotator("canny")(Image.open("photo.jpg"))
image = pipe(
    prompt="a lighthouse in the evening",
    controlnet_inputs=[ControlNetInput(image=edges, scale=0.7)],
    seed=0,
)
image.save("lighthouse.jpg")
