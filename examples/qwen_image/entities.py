"""Give parts of an image prompts of their own, by masks, with an EliGen LoRA.

The model is qwen-image.
"""

from PIL import Image

import diffsynth
from diffsynth import ModelConfig

pipe = diffsynth.load("qwen-image")
lora = ModelConfig(model_id="DiffSynth-Studio/Qwen-Image-EliGen-V2", origin_file_pattern="model.safetensors")
pipe.load_lora(pipe.dit, lora)

cat, dog = Image.new("L", (1024, 1024)), Image.new("L", (1024, 1024))
cat.paste(255, (0, 400, 480, 1024))  # left, top, right, bottom in pixels
dog.paste(255, (540, 300, 1024, 1024))
image = pipe(
    prompt="a cat and a dog on a green sofa",
    eligen_entity_prompts=["a black cat", "a white dog"],
    eligen_entity_masks=[cat, dog],
    height=1024,
    width=1024,
    seed=0,
)
image.save("cat_and_dog.jpg")
