"""Generate an image that follows a control image, such as edges, depth or a pose, with a LoRA that is trained for it.

The model is qwen-image.
"""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig
from diffsynth.utils.controlnet import Annotator

pipe = diffsynth.load("qwen-image")
lora = ModelConfig(
    model_id="DiffSynth-Studio/Qwen-Image-In-Context-Control-Union", origin_file_pattern="model.safetensors"
)
pipe.load_lora(pipe.dit, lora)
edges = Annotator("canny")(Image.open("photo.jpg"))
image = pipe(
    prompt="Context_Control. a lighthouse in the evening",
    context_image=edges,
    height=1024,
    width=1024,
    seed=0,
)
image.save("lighthouse.jpg")
