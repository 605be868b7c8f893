"""Generate a video from a control video and reference images, or edit a video where a mask is white.

vace-wan2.1-1.3b-preview
wan2.1-vace-1.3b
wan2.1-vace-14b
wan2.2-vace-fun-a14b        two experts
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import VideoData, save_video

pipe = diffsynth.load("wan2.1-vace-1.3b")
texts = {"prompt": "two cats in boxing gloves fight on a stage", "negative_prompt": "overexposed, static, blurred"}
depth = VideoData("depth.mp4", height=480, width=832)
cats = Image.open("cats.jpg")

video = pipe(**texts, vace_video=depth, vace_reference_image=cats, seed=0)
save_video(video, "cats_by_depth.mp4", fps=16, quality=5)

scene = VideoData("scene.mp4", height=480, width=832)
mask = VideoData("mask.mp4", height=480, width=832)
video = pipe(**texts, vace_video=scene, vace_video_mask=mask, seed=0)
save_video(video, "scene_with_cats.mp4", fps=16, quality=5)
