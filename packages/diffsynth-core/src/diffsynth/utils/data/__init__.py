"""`diffsynth.utils.data`: reading and writing images, video and sound."""

from diffsynth.compat.doors import with_doors
from diffsynth.core.data.image import contact_sheet, read_image
from diffsynth.core.data.media import VideoData, read_audio
from diffsynth.core.data.media_writer import merge_video_audio, save_frames, save_video, save_video_with_audio

__all__ = [
    "VideoData",
    "contact_sheet",
    "merge_video_audio",
    "read_audio",
    "read_image",
    "save_frames",
    "save_video",
    "save_video_with_audio",
]

__path__ = with_doors(__path__, "utils.data")
