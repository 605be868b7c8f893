"""Generate a video controlled by poses, depth or edges, and by a reference image.

wan2.1-fun-v1.1-1.3b-control
wan2.1-fun-v1.1-14b-control
wan2.2-fun-a14b-control         two experts
wan2.1-fun-1.3b-control         takes no reference_image, nor does the next one
wan2.1-fun-14b-control
"""

from PIL import Image

import diffsynth
from diffsynth.utils.data import VideoData, save_video

pipe = diffsynth.load("wan2.1-fun-v1.1-1.3b-control")
video = pipe(
    prompt="a girl in a blue dress turns around and smiles",
    negative_prompt="overexposed, static, blurred",
    control_video=VideoData("poses.mp4", height=832, width=576),
    reference_image=Image.open("girl.jpg"),
    height=832,
    width=576,
    num_frames=49,
    seed=0,
)
save_video(video, "girl.mp4", fps=16, quality=5)
