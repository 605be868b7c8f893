"""`Annotator`: the condition image of a ControlNet from a picture."""

from __future__ import annotations

from typing import Any

from PIL import Image

from diffsynth.core.data.edges import canny
from diffsynth.errors import Unavailable, did_you_mean

_UNCHANGED = ("tile", "none", "inpaint")
_NEED_MODELS = ("depth", "softedge", "lineart", "lineart_anime", "openpose", "normal")
PROCESSORS = ("canny", *_UNCHANGED, *_NEED_MODELS)


class Annotator:
    """Makes a condition image; call it with a picture.

    Args:
        processor_id: "canny" draws edges; "tile", "none" and "inpaint" leave the picture as it is.
        model_path: where the other kinds would find their networks.
        detect_resolution: pixels of the shorter side at which edges are looked for; None is the picture's own.
        device: where networks would run.
        skip_processor: leave the picture as it is, whatever the kind.

    Raises:
        ValueError: no such kind.
        Unavailable: a kind that needs a network of its own, which this version does not have.
    """

    def __init__(
        self,
        processor_id: str,
        model_path: str = "models/Annotators",
        detect_resolution: int | None = None,
        device: Any = None,
        skip_processor: bool = False,
    ) -> None:
        if processor_id not in PROCESSORS:
            raise ValueError(
                f"processor_id={processor_id!r} is unknown{did_you_mean(processor_id, PROCESSORS)}; "
                f"expected one of {', '.join(PROCESSORS)}"
            )
        if processor_id in _NEED_MODELS and not skip_processor:
            raise Unavailable(
                f"Annotator({processor_id!r}) needs a network that this version does not have. Make the condition "
                f"image with another program and pass it as it is, or use 'canny'."
            )
        self.processor_id = processor_id
        self.detect_resolution = detect_resolution
        self.skip_processor = skip_processor

    def __call__(self, image: Image.Image) -> Image.Image:
        """The condition image, RGB, of the picture's size."""
        image = image.convert("RGB")
        if self.skip_processor or self.processor_id in _UNCHANGED:
            return image
        if self.detect_resolution is None:
            return canny(image)
        scale = self.detect_resolution / min(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        return canny(small).resize(image.size, Image.Resampling.BICUBIC)
