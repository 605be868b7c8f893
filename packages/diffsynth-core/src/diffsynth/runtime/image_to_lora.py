"""Image-to-LoRA: LoRAs made from images, as a feature of a family's pipeline and as a pipeline of its own.

The embeddings of SigLIP 2 and of DINOv3 of an image are joined to one vector; networks of the family
(`diffsynth.models.image_to_lora`) make LoRAs of it. A family with one network has the unit `style_changes`; units of
further networks add to `image2lora_changes` alike. The LoRA of several images is the mean of their changes, and that of
several networks the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.color import to_rgb
from diffsynth.core.data.image import cover
from diffsynth.core.lora import LoRA
from diffsynth.core.lora.arithmetic import stacked
from diffsynth.core.lora.changes import LoRALayer
from diffsynth.core.lora.format import to_state_dict
from diffsynth.errors import InvalidPipeline, MissingComponent
from diffsynth.models.image_pixels import dinov3_pixels, siglip_pixels
from diffsynth.runtime.feature import Configs, Feature
from diffsynth.runtime.images import Images, image_list
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.role import Agreement, Processor, Role, config_of
from diffsynth.runtime.unit import Phase, Unit, unit

SIGLIP, DINOV3, STYLE = "siglip2_image_encoder", "dinov3_image_encoder", "image2lora_style"
"""Roles: the two image encoders, and the network that makes a LoRA of the style of images."""

NETWORK_PREFIX = "image2lora_"
"""Prefix of the roles of the networks that make LoRAs."""

Changes = tuple[Mapping[str, tuple[Tensor, Tensor]], ...]
"""For each image and network: name of a linear layer -> (matrix A `rank inputs`, matrix B `outputs rank`)."""

_SIDE = 1024
"""Pixels of the square that images are scaled to cover and cropped to, before the encoders scale them to their own."""


class ImageToLoRAArguments(TypedDict, total=False):
    """Images to make a LoRA of.

    Args:
        image2lora_images: Image, or list of images, of a style. The LoRA that is made of them is computed by the branch
            of the prompt alone, besides that in `positive_only_lora`.
    """

    image2lora_images: Images


@unit("image2lora_x", "image2lora_changes", phase=Phase.ENCODE, only_with="image2lora_images")
def embed_images(
    siglip2_image_encoder: Any,
    dinov3_image_encoder: Any,
    *,
    image2lora_images: Images = None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "n e"], Changes]:
    """Return (a tensor `n e`: for each image the pooled outputs of SigLIP 2 and of DINOv3, one after the other; an
    empty tuple, to which the units of the networks add).
    """
    images = [cover(to_rgb(image), _SIDE, _SIDE) for image in image_list(image2lora_images)]
    size, bilinear = siglip2_image_encoder.config.image_size, Image.Resampling.BILINEAR
    siglip = torch.cat([siglip_pixels(image, size, resample=bilinear) for image in images])
    dinov3 = torch.cat([dinov3_pixels(image, dinov3_image_encoder.config.image_size) for image in images])
    first = siglip2_image_encoder(siglip.to(device, dtype), pooled=True)
    return torch.cat((first, dinov3_image_encoder(dinov3.to(device, dtype))), dim=1), ()


@unit("image2lora_changes", only_with="image2lora_images")
def style_changes(
    image2lora_style: Any,
    *,
    image2lora_images: Images = None,
    image2lora_x: Float[Tensor, "n e"],
    image2lora_changes: Changes,
) -> Changes:
    """Return the changes so far, and those of the network for the style."""
    return (*image2lora_changes, *(image2lora_style(each) for each in image2lora_x))


def mean_lora(changes: Sequence[Mapping[str, tuple[Tensor, Tensor]]], count: int) -> LoRA:
    """Return a `LoRA`: the sum of all changes, divided by `count`; its rank is the sum of theirs.

    Args:
        changes: name of a linear layer -> (matrix A, matrix B) of each image and network.
        count: the number of images.
    """
    names = dict.fromkeys(name for each in changes for name in each)
    layers = {
        name: stacked(name, [LoRALayer(*each[name]) for each in changes if name in each], 1 / count) for name in names
    }
    return LoRA(layers, "the LoRA of image2lora_images")


@unit("positive_only_lora", only_with="image2lora_images")
def add_lora_of_images(
    *,
    image2lora_images: Images = None,
    image2lora_x: Float[Tensor, "n e"],
    image2lora_changes: Changes,
    positive_only_lora: tuple[LoRA, ...] | None,
) -> tuple[LoRA, ...]:
    """Return the LoRAs of the conditional branch of guidance, a tuple: those of the call, then that of the images."""
    return (*(positive_only_lora or ()), mean_lora(image2lora_changes, len(image2lora_x)))


def check_networks(configs: Configs) -> None:
    """Raise an error unless all networks that make a LoRA are there, and fit each other.

    Args:
        configs: role -> config of its component, None for one that is not loaded.

    Raises:
        MissingComponent: an image encoder, or every network that makes LoRAs, is not loaded.
        InvalidPipeline: a network takes another width than the encoders have together.
    """
    networks = [role for role in configs if role.startswith(NETWORK_PREFIX)]
    loaded = [role for role in networks if configs[role] is not None]
    missing = [role for role in (SIGLIP, DINOV3) if configs[role] is None]
    if missing or not loaded:
        wanted = [*missing, *([] if loaded else [" or ".join(networks)])]
        raise MissingComponent(
            f"image2lora_images needs {' and '.join(wanted)}; add the files of General-Image-Encoders and of the "
            "model's image-to-LoRA network to model_configs"
        )
    found = configs[SIGLIP].hidden_size + configs[DINOV3].hidden_size
    for role in loaded:
        if found != configs[role].image_dim:
            raise InvalidPipeline(
                f"{SIGLIP} and {DINOV3} have {found} channels together, and {role} takes {configs[role].image_dim}; "
                "these components do not fit each other. Use SigLIP2-G384 and DINOv3-7B"
            )


def image_to_lora_roles(networks: Mapping[str, str], *, optional: bool = True) -> dict[str, Role | Processor]:
    """Return a dict role -> `Role` of the networks that make LoRAs.

    Args:
        networks: role, which begins with `NETWORK_PREFIX` -> name of the architecture of the family's network.
        optional: whether the roles may stay empty; where there are several networks, one of them is enough.
    """
    encoders = {SIGLIP: "siglip_image_encoder", DINOV3: "dinov3_image_encoder"}
    return {
        role: Role(architectures=(name,), optional=optional or (role in networks and len(networks) > 1))
        for role, name in (encoders | dict(networks)).items()
    }


def image_to_lora_feature(
    networks: Mapping[str, str],
    *,
    units: Sequence[Unit] = (style_changes,),
    roles: Mapping[str, Role | Processor] = MappingProxyType({}),
    agreements: Sequence[Agreement] = (),
    check_components: Callable[[Configs], None] = check_networks,
) -> Feature:
    """Return the `Feature` of a family's pipeline whose calls take images to make a LoRA of.

    Args:
        networks: role -> name of the architecture, see `image_to_lora_roles`.
        units: of the networks; each adds to `image2lora_changes`.
        roles: role -> `Role` of what the units use besides the networks.
        agreements: see `Feature`.
        check_components: raises an error unless the components that make a LoRA are there and fit each other; called
            for a call with images.
    """

    def check(configs: Configs, values: Mapping[str, Any]) -> None:
        if values["image2lora_images"] is not None:
            check_components(configs)

    return Feature(
        "image_to_lora",
        arguments=ImageToLoRAArguments,
        roles=image_to_lora_roles(networks) | dict(roles),
        units=(embed_images, *units, add_lora_of_images),
        agreements=tuple(agreements),
        check=check,
        alone=True,
    )


@unit("output")
def lora_of_images(*, image2lora_x: Float[Tensor, "n e"], image2lora_changes: Changes) -> list[dict[str, Tensor]]:
    """Return a list of one LoRA, the mean of those of the images: key -> tensor."""
    return [to_state_dict(mean_lora(image2lora_changes, len(image2lora_x)))]


class ImageToLoRAPipeline(Pipeline):
    """Makes the LoRA of a style from images; a family subclasses it with its own networks.

        pipe = ZImageImageToLoRAPipeline.from_pretrained(model_configs=[...])
        lora = pipe(image2lora_images=images)

    A call returns a dict key -> tensor, which `load_lora(state_dict=)`, `positive_only_lora=` and `save_lora` take.
    """

    units = (embed_images, style_changes)
    output_units = (lora_of_images,)
    loop_roles = ()
    per_image = ()
    output_kind = "tensors"

    @classmethod
    def from_pipeline(cls, pipe: Pipeline) -> ImageToLoRAPipeline:
        """Return a pipeline with the components that `pipe` has for its roles; they are shared, not copied.

        Raises:
            MissingComponent: `pipe` has none for a role that is not optional.
        """
        found = {role: pipe.components.get(role) for role in cls.roles}
        if missing := [role for role, part in found.items() if part is None and not cls.roles[role].optional]:
            raise MissingComponent(f"{cls.__name__} needs {' and '.join(missing)}; add the files to model_configs")
        return cls(found, device=pipe.device, torch_dtype=pipe.dtype)  # type: ignore[return-value]

    def check(self, **arguments: Any) -> Any:
        """Check the arguments of a call; see `Pipeline.check`.

        Raises:
            ValueError: no image is given.
            MissingComponent: no network that makes LoRAs is loaded.
            InvalidPipeline: the networks do not fit each other.
        """
        request = super().check(**arguments)
        if request.values["image2lora_images"] is None:
            raise ValueError("image2lora_images=None: expected an image, or a list of images")
        self.check_components({role: config_of(part) for role, part in self.components.items()})
        return request

    def check_components(self, configs: Configs) -> None:
        """Raise an error unless the networks of the call are loaded and fit each other; see `check_networks`.

        Raises:
            MissingComponent, InvalidPipeline: as for `check_networks`.
        """
        check_networks(configs)
