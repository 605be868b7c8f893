"""Generate the video between a first and a last image.

wan2.1-flf2v-14b-720p       needs both images
wan2.1-fun-1.3b-inp         does not need the last image, nor do those below
wan2.1-fun-14b-inp
wan2.1-fun-v1.1-1.3b-inp
wan2.1-fun-v1.1-14b-inp
wan2.2-fun-a14b-inp         two experts
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("wan2.1-flf2v-14b-720p")
video = pipe(
    prompt="a bud opens into a flower, time lapse",
    negative_prompt="overexposed, static, blurred",
    input_image=Image.open("bud.jpg"),
    end_image=Image.open("flower.jpg"),
    height=960,
    width=960,
    num_frames=33,
    seed=0,
)
save_video(video, "bloom.mp4", fps=16, quality=5)
