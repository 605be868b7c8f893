"""A linear layer whose weight is quantized."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.quant.method import QuantMethod


class QuantizedLinear(nn.Linear):
    """A linear layer that stores the parts of a quantized weight in place of the weight.

    The parts are frozen parameters of the layer, `weight` among them, so they are saved, loaded, offloaded and planned
    as other parameters are. Gradients flow to the input, and to no part.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        method: of the weight.
        bias: whether the layer has one; it is not quantized.
        dtype: of the bias, and of what is computed beside the weight, such as a LoRA.
        device: of the parameters, which are not initialized.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        method: QuantMethod,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.method = method
        forms = method.parts(out_features, in_features)
        self.part_names = tuple(forms)
        for name, part in forms.items():
            empty = torch.empty(part.shape, dtype=part.stored, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", None)
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear, method: QuantMethod) -> QuantizedLinear:
        """Return a layer with the quantized weight and the bias of `layer`, on its device."""
        made = cls.shell(layer, method)
        made.fill(layer.weight.detach())
        made.bias = layer.bias
        return made

    @classmethod
    def shell(cls, layer: nn.Linear, method: QuantMethod) -> QuantizedLinear:
        """Return a layer of the sizes of `layer`, in its mode, whose parameters are on meta."""
        made = cls(
            layer.in_features,
            layer.out_features,
            method=method,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
            device="meta",
        )
        return made.train(layer.training)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Dict name of a part -> tensor of an integer dtype."""
        return {name: getattr(self, name) for name in self.part_names}

    def fill(self, weight: Float[Tensor, "o i"]) -> None:
        """Quantize a weight and take its parts, which are on its device, in place of the layer's own."""
        for name, part in self.method.quantize(weight).items():
            setattr(self, name, nn.Parameter(part, requires_grad=False))

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Return the output of the layer, in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.method.linear(x, self.parts, bias)

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """Return an ordinary frozen layer with the weight that the parts stand for."""
        weight = self.method.dequantize(self.parts, dtype)
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=dtype, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes and the method."""
        return f"in_features={self.in_features}, out_features={self.out_features}, method={self.method}"
