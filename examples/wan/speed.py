"""Text to video with a given amount of motion, from 0 to 100.

wan2.1-1.3b-speedcontrol-v1
"""

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("wan2.1-1.3b-speedcontrol-v1")
for speed in (0, 100):
    video = pipe(
        prompt="a lively puppy runs across a green lawn",
        negative_prompt="overexposed, static, blurred",
        motion_bucket_id=speed,
        seed=0,
    )
    save_video(video, f"speed_{speed}.mp4", fps=16, quality=5)
