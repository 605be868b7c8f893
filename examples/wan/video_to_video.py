"""Video to video: `denoising_strength` is the noise level that the input video is raised to.

wan2.1-t2v-1.3b
wan2.1-t2v-14b
wan2.2-t2v-a14b     two experts; below a strength of 0.58 only the second one runs
"""

import diffsynth
from diffsynth.utils.data import VideoData, save_video

pipe = diffsynth.load("wan2.1-t2v-1.3b")
video = pipe(
    prompt="a lively puppy in sunglasses runs across a green lawn",
    negative_prompt="overexposed, static, blurred",
    input_video=VideoData("puppy.mp4", height=480, width=832),
    denoising_strength=0.7,
    seed=1,
)
save_video(video, "puppy_in_sunglasses.mp4", fps=16, quality=5)
