"""Door: video files with sound."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "read_video_audio": use("VideoData for the frames and read_audio for the sound, both of diffsynth.utils.data"),
        "write_video_audio": use("diffsynth.utils.data.save_video_with_audio"),
    },
)
