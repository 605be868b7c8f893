"""The label of a call: its argument, its units and its check, as one feature of the pipeline."""

from collections.abc import Sequence
from typing import TypedDict

import torch

from diffsynth import Feature, Phase, unit


class LabelArguments(TypedDict, total=False):
    """Class of the image.

    Args:
        label: Class of the image, at least 0 and below the number of classes; a list gives an image for each entry.
    """

    label: int | Sequence[int]


@unit("null_label", phase=Phase.TEXT)
def null_label(*, num_classes: int, batch_size: int):
    """Return the null class for each image, a list of ints: the label of the branch `uncond`."""
    return [num_classes] * batch_size


@unit("labels", branches={"uncond": {"label": "null_label"}})
def encode_label(*, label: int | Sequence[int] = 0, device: torch.device):
    """Return the classes, a tensor `b`."""
    return torch.tensor(label, device=device)


def check(configs, values):
    """Raise ValueError for a label that is no class of the loaded network."""
    if configs["unet"] is None:
        return
    count = configs["unet"].num_classes
    for label in values["label"]:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
            raise ValueError(f"label={label!r}: expected an integer from 0 to {count - 1}, a class of this network")


LABEL = Feature(
    "label",
    arguments=LabelArguments,
    facts={"num_classes": "unet.num_classes"},
    units=(null_label, encode_label),
    per_image=("label",),
    check=check,
)
