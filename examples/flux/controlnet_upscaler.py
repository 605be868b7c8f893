"""Generate an image from a small one, with more detail, with a ControlNet for flux.1-dev."""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput

controlnet = ModelConfig(
    model_id="jasperai/Flux.1-dev-Controlnet-Upscaler", origin_file_pattern="diffusion_pytorch_model.safetensors"
)
pipe = diffsynth.load("flux.1-dev", components={"controlnet": controlnet})
small = Image.open("cat.jpg").resize((2048, 2048))
image = pipe(
    prompt="a photo of a cat",
    controlnet_inputs=[ControlNetInput(image=small, scale=0.7)],
    input_image=small,
    denoising_strength=0.99,
    height=2048,
    width=2048,
    tiled=True,
    seed=0,
)
image.save("large_cat.jpg")
