"""Door: writing sound."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        "save_audio": use(
            "torchaudio.save or soundfile.write; diffsynth.utils.data.save_video_with_audio writes sound beside images"
        )
    },
)
