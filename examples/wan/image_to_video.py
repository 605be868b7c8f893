"""Generate a video that begins with an image.

wan2.1-i2v-14b-480p
wan2.1-i2v-14b-720p
wan2.2-i2v-a14b     two experts of 14B
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("wan2.1-i2v-14b-480p")
video = pipe(
    prompt="a small boat on a wide sea turns towards the sun",
    negative_prompt="overexposed, static, blurred",
    input_image=Image.open("boat.jpg"),
    seed=0,
)
save_video(video, "boat.mp4", fps=16, quality=5)
