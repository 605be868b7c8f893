"""Animate a character by a reference video, without pose, face or mask videos.

wan2.2-animate-2-14b
wan2.2-animate-2-14b-distilled  10 steps without guidance
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import VideoData, save_video

pipe = diffsynth.load("wan2.2-animate-2-14b")
video = pipe(
    prompt="a woman in a red coat, on a beach",
    animate2_reference_image=Image.open("character.jpg"),
    animate2_reference_video=VideoData("dance.mp4", height=480, width=832),
    animate2_prompt_ref="a person dances",
    height=480,
    width=832,
    seed=0,
)
save_video(video, "character_dances.mp4", fps=24, quality=5)
