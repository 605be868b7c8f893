"""Components without weights, on meta, for plans: copies of loaded components, or built from headers and layouts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from diffsynth import _discovery, _env
from diffsynth._models import ModelRecord
from diffsynth.core.loader import component, files, header, recognize
from diffsynth.core.loader.checkpoint import read_config
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.layouts import layout_of
from diffsynth.core.vram.managed import managed
from diffsynth.errors import Unplannable, Unrecognized, shortened
from diffsynth.runtime.architectures import architecture_of
from diffsynth.runtime.role import Role, role_of


class FixedLengthTokenizer:
    """A tokenizer that returns the same number of tokens for every text, none of them padding.

    Args:
        length: number of tokens, unless the caller pads or cuts to another length.
    """

    pad_token_id = eos_token_id = 0
    is_fast = True

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: Any = False,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        **_: Any,
    ) -> Any:
        """Return a `BatchEncoding`: `input_ids` and `attention_mask`, int64 ones `b s`; `s` is fixed, or set by
        `max_length`. With `return_offsets_mapping` each token is of all characters.

        `max_length` cuts, and pads if `padding` is "max_length".
        """
        from transformers import BatchEncoding

        count = 1 if isinstance(text, str) else len(text)
        length = self.length if max_length is None else min(self.length, max_length)
        if padding == "max_length" and max_length is not None:
            length = max_length
        ids = torch.ones(count, length, dtype=torch.long)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if return_offsets_mapping:
            longest = len(text) if isinstance(text, str) else max(map(len, text))
            made["offset_mapping"] = torch.tensor([0, longest]).expand(count, length, 2)
        return BatchEncoding(made)


def without_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of `module` on the meta device, without data; a wrapped module is built anew from its config.

    Args:
        module: of a pipeline; it may be wrapped.
        dtype: that a wrapped component computes in.

    Raises:
        Unplannable: it is wrapped, and its class cannot be built from its config alone.
    """
    if managed(module) is None:
        tensors = (*module.parameters(), *module.buffers())
        return copy.deepcopy(module, memo={id(tensor): _on_meta(tensor) for tensor in tensors})
    # The forward of a wrapped module moves weights, and a copy would do so, too: it is built anew instead.
    if architecture_of(module) is None:
        raise Unplannable(
            f"{type(module).__name__} is wrapped, and no plugin declares its class; plan before it is wrapped"
        )
    try:
        with torch.device("meta"):
            built = type(module)(module.config)
    except TypeError as error:
        raise Unplannable(
            f"{type(module).__name__} is wrapped and cannot be built from its config alone ({error}); "
            "plan before it is wrapped"
        ) from error
    return built.to(dtype).eval().requires_grad_(False)


def declared_components(
    record: ModelRecord,
    dtype: torch.dtype,
    *,
    given: Mapping[str, ModelConfig] = MappingProxyType({}),
    roles: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, nn.Module]:
    """Return a dict role -> module on meta for a model, built from its files' headers or else from published layouts.

    Args:
        record: of the model.
        dtype: of floating parameters.
        given: role -> file to use instead of the model's own, or for a role that it has no file for.
        roles: role -> its `Role`; of a file with several components, or one given, the role takes what it accepts.

    Raises:
        Unplannable: a file is not on this machine, and no plugin ships its layout.
        CheckpointError: a file is corrupt, or of no known architecture; `Unrecognized` if its role takes another.
    """
    architectures, checkpoints = _discovery.catalog().layouts()
    made = {}
    for role, source in (dict(record.components) | dict(given)).items():
        tensors = read_config(source) if isinstance(source, ModelConfig) and source.path else _header(_text(source))
        found = recognize.recognize(tensors, architectures, checkpoints)
        need = roles.get(role_of(role))
        fitting = [each for each in found if isinstance(need, Role) and need.accepts(each.architecture)]
        if role in given and isinstance(need, Role) and not fitting:
            raise Unrecognized(
                f"{role} is given {shortened(tensors.files)}, a {found[0].architecture.name}; "
                f"the role takes {' or '.join(need.architectures)}"
            )
        module, weights = component.open_component((fitting or found)[0], tensors, dtype=dtype)
        made[role] = component.materialize(module, weights, device="meta")
    return made


def is_here(source: str) -> bool:
    """Whether all files that a source (text such as "owner/repository:*.safetensors") names are on this machine."""
    return files.weights_state([source], _env.model_base_path()) == "present"


def _header(source: str) -> header.Header:
    if is_here(source):
        return read_config(ModelConfig.from_source(source))
    for checkpoint in _discovery.catalog().layouts()[1]:
        if source in checkpoint.files and (published := layout_of(checkpoint)):
            return _header_of_shapes(published)
    raise Unplannable(
        f"{source} is not on this machine, and no installed plugin ships its layout. Download it, or plan another model"
    )


def _text(source: ModelConfig | str) -> str:
    if isinstance(source, str):
        return source
    return source.source or f"{source.model_id}:{source.origin_file_pattern}"


def _header_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> header.Header:
    return header.Header({key: header.TensorInfo("BF16", shape) for key, shape in shapes.items()})


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
