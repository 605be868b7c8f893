"""Generate an image that follows edges and depth, with two block-wise ControlNets for qwen-image."""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.runtime.controlnet import ControlNetInput

canny, depth = (
    ModelConfig(
        model_id=f"DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-{kind}", origin_file_pattern="model.safetensors"
    )
    for kind in ("Canny", "Depth")
)
pipe = diffsynth.load("qwen-image", components={"blockwise_controlnet[0]": canny, "blockwise_controlnet[1]": depth})
image = pipe(
    prompt="a lighthouse in the evening",
    blockwise_controlnet_inputs=[
        ControlNetInput(image=Image.open("edges.png"), scale=0.8),
        ControlNetInput(image=Image.open("depth.png"), controlnet_id=1, scale=0.5, end=0.3),
    ],
    seed=0,
)
image.save("lighthouse.jpg")
