"""The two units that scripts for DiffSynth-Studio call by themselves to make a LoRA of images."""

from __future__ import annotations

from typing import Any, ClassVar

from diffsynth.runtime.image_to_lora import ImageToLoRAPipeline
from diffsynth.runtime.images import Images


class Image2LoRAEncode:
    """First of the two units. The images are encoded by the second one, which loads the networks that it uses."""

    def process(self, pipe: Any, image2lora_images: Images) -> dict[str, Any]:
        """Return what `Image2LoRADecode.process` takes as keyword arguments, a dict with the images; empty for None."""
        return {} if image2lora_images is None else {"image2lora_images": image2lora_images}


class Image2LoRADecode:
    """Second of the two units; a family subclasses it with its pipeline."""

    pipeline: ClassVar[type[ImageToLoRAPipeline]]

    def process(self, pipe: Any, image2lora_images: Images = None) -> dict[str, Any]:
        """Return a dict with the entry "lora", the LoRA of the images, key -> tensor; empty without images.

        Args:
            pipe: a pipeline with the networks of image-to-LoRA.
            image2lora_images: from `Image2LoRAEncode.process`.

        Raises:
            MissingComponent: a network is not loaded.
        """
        if image2lora_images is None:
            return {}
        maker = self.pipeline.from_pipeline(pipe)
        return {"lora": maker(image2lora_images=image2lora_images)}
