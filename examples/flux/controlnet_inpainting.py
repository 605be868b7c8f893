"""Replace the part of an image where a mask is white, with a ControlNet for flux.1-dev."""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput

controlnet = ModelConfig(
    model_id="alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta",
    origin_file_pattern="diffusion_pytorch_model.safetensors",
)
pipe = diffsynth.load("flux.1-dev", components={"controlnet": controlnet})
photo, mask = Image.open("table.jpg"), Image.open("mask.png")
image = pipe(
    prompt="a vase of tulips on the table",
    controlnet_inputs=[ControlNetInput(image=photo, inpaint_mask=mask, scale=0.9)],
    seed=0,
)
image.save("table_with_tulips.jpg")
