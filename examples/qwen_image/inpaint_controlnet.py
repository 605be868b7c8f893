"""Replace the part of an image where a mask is white, with a block-wise ControlNet for qwen-image."""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput

controlnet = ModelConfig(
    model_id="DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Inpaint", origin_file_pattern="model.safetensors"
)
pipe = diffsynth.load("qwen-image", components={"blockwise_controlnet": controlnet})
photo, mask = Image.open("table.jpg"), Image.open("mask.png")
image = pipe(
    prompt="a vase of tulips on the table",
    blockwise_controlnet_inputs=[ControlNetInput(image=photo, inpaint_mask=mask)],
    input_image=photo,
    inpaint_mask=mask,
    seed=0,
)
image.save("table_with_tulips.jpg")
