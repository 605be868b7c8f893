"""Text to video in 6 steps without guidance, with a distilled model.

krea-realtime-video
"""

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("krea-realtime-video")
video = pipe(prompt="a cat sits on a sofa and looks out of the window", seed=0)
save_video(video, "cat.mp4", fps=16, quality=5)
