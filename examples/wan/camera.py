"""Image to video with a camera that turns: Left, Right, Up, Down, LeftUp, LeftDown, RightUp or RightDown.

wan2.1-fun-v1.1-1.3b-control-camera
wan2.1-fun-v1.1-14b-control-camera
wan2.2-fun-a14b-control-camera      two experts
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import save_video

pipe = diffsynth.load("wan2.1-fun-v1.1-1.3b-control-camera")
video = pipe(
    prompt="a small boat on a wide sea",
    negative_prompt="overexposed, static, blurred",
    input_image=Image.open("boat.jpg"),
    camera_control_direction="Left",
    camera_control_speed=0.01,
    seed=0,
)
save_video(video, "camera_turns_left.mp4", fps=16, quality=5)
