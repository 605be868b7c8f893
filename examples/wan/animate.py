"""Animate a character by pose and face videos, in a new scene or in place of the person in a given one.

wan2.2-animate-14b

Pose, face, scene and mask videos are extracted from a video beforehand; each needs num_frames - 4 frames.
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import VideoData, save_video

pipe = diffsynth.load("wan2.2-animate-14b")
motion = {
    "prompt": "the person in the video dances",
    "input_image": Image.open("character.jpg"),
    "animate_pose_video": VideoData("poses.mp4", height=720, width=1280),
    "animate_face_video": VideoData("face.mp4", height=512, width=512),
}

video = pipe(**motion, seed=0)
save_video(video, "character_dances.mp4", fps=16, quality=5)

scene = VideoData("scene.mp4", height=720, width=1280)
mask = VideoData("mask.mp4", height=720, width=1280)
video = pipe(**motion, animate_inpaint_video=scene, animate_mask_video=mask, seed=0)
save_video(video, "character_in_scene.mp4", fps=16, quality=5)
