"""Text or image to video at 24 frames per second.

wan2.2-ti2v-5b
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("wan2.2-ti2v-5b")
texts = {"prompt": "two cats in boxing gloves fight on a stage", "negative_prompt": "overexposed, static, blurred"}

video = pipe(**texts, seed=0)
save_video(video, "cats.mp4", fps=24, quality=5)

video = pipe(**texts, input_image=Image.open("cats.jpg"), seed=0)
save_video(video, "cats_from_image.mp4", fps=24, quality=5)
