"""Generate a video from a prompt.

wan2.1-t2v-1.3b
wan2.1-t2v-14b
wan2.2-t2v-a14b     two experts of 14B; with vram_limit=24 in load(), only the expert in use is on the device
"""

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("wan2.1-t2v-1.3b")
video = pipe(
    prompt="a lively puppy runs across a green lawn, documentary photography",
    negative_prompt="overexposed, static, blurred",
    seed=0,
)
save_video(video, "puppy.mp4", fps=16, quality=5)
