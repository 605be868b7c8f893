"""The lifetime of a pipeline's components: moved, released, and made ready before the first call."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.torch_defaults import torch_defaults
from diffsynth.core.vram.managed import managed
from diffsynth.errors import NotEnoughMemory, PipelineError
from diffsynth.runtime.progress import no_progress

_WARMUP_STEPS = 2
"""Steps of a warm-up: the first and the last step of a model with two experts use one each."""


class LifetimeMethods:
    """The methods of `Pipeline` that move and release its components, and make it ready."""

    def to(self: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Move the components, and return the pipeline itself; calls then equal those of a pipeline loaded there, bit
        for bit. Weights that were rounded to a smaller dtype before stay rounded.

        Pipelines that share components compute where these are, so they must be moved, too.

        Args:
            device: the device that computes; None is the present one.
            dtype: of weights and activations, `torch.bfloat16`, `float16` or `float32`; None is the present one.
                Weights that are no floating-point numbers keep theirs.

        Raises:
            PipelineError: a component is under a memory policy, the pipeline has a `vram_limit` or computes together
                with other processes, or a call of it runs.
            NotEnoughMemory: the device has not enough free memory; nothing was moved.
            ValueError: a device that is not in this machine, or that does not compute in the dtype.
            TypeError: a `dtype` that is no floating-point `torch.dtype`.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"device={device}: expected a device such as 'cuda'; pass it as dtype={device}")
        device = self.device if device is None else devices.check_device(device)
        dtype = self.dtype if dtype is None else devices.check_dtype(devices.check_floating(dtype, "dtype"), device)
        self.running_calls.refuse("to()")
        _refuse_to_move(self)
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        _check_memory(modules, device, dtype)
        for module in modules:
            move(module, device, dtype)
        self.device, self.dtype, self.size_limits = device, dtype, None
        self._follow_wrapped()
        return self

    def unload(self: Any) -> None:
        """Release the components, and with them their memory on host and device, caches of the device and plans. The
        pipeline then refuses calls; unloading it again does nothing.

        Components that another pipeline or the caller's program holds stay, on the host if they are under a policy.

        Raises:
            PipelineError: a call of this pipeline runs.
        """
        if isinstance(self.components, _Unloaded):
            return
        self.running_calls.refuse("unload()")
        self._offloader.end_call(None)
        name = type(self).__name__
        again = f"{name}.from_pretrained(...)" if self.model_name is None else f"diffsynth.load({self.model_name!r})"
        self.components = _Unloaded(f"this {name} was unloaded. Load it again: {again}")
        self.plan_cache = None
        self._offloader = type(self._offloader)({}, self.device)
        gc.collect()  # modules refer to their wrappers, and these to them
        if self.device.type not in ("cpu", "meta"):
            devices.empty_cache(self.device)

    def __enter__(self: Any) -> Any:
        """Return the pipeline, which is unloaded at the end of `with`."""
        return self

    def __exit__(self: Any, *error: object) -> None:
        self.unload()

    @torch_defaults()
    @torch.no_grad()
    def warmup(self: Any, **arguments: Any) -> None:
        """Make a call of two steps and discard its output, so that compiled blocks, autotuned kernels, the memory plan
        and the weights' pages are ready for the first request. Later calls return the same bits as without it.

        Observers, such as the hooks `denoise_started` and `step_done`, are not notified, and no warnings are logged.

        Args:
            arguments: of the call that is expected, by default the model's default call with an empty prompt. Its
                plan is made for all steps, and two are run unless `num_inference_steps` is given.

        Raises:
            Exception: the error that the call would raise, such as for an image that the model needs.
        """
        given = {"seed": 0, "progress_bar_cmd": no_progress, **arguments}
        with self.running_calls.entered():
            request = self._planned_request(given)
            loop = request.loop
            if "num_inference_steps" not in arguments:
                loop = replace(loop, num_inference_steps=min(loop.num_inference_steps, _WARMUP_STEPS))
            self._run(replace(request, loop=loop, is_warmup=True))


def move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a module to a device, in place; floating-point weights get `dtype`, as `load_component` reads them.

    Buffers that no file holds, such as tables of angles, keep their dtype.

    Args:
        module: without wrapped submodules.
        device: where its tensors are moved to.
        dtype: of floating-point parameters and of buffers in the state dict.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(device, dtype)  # one by one, so that no second copy of all is in memory
    module.to(device)


def _refuse_to_move(pipe: Any) -> None:
    """Raise PipelineError for a pipeline whose components another object moves."""
    wrapped = [role for role, part in pipe.parts.items() if isinstance(part, nn.Module) and managed(part) is not None]
    if wrapped or pipe.vram_limit is not None:
        what = f"has vram_limit={pipe.vram_limit}" if not wrapped else f"has {', '.join(wrapped)} under a memory policy"
        raise PipelineError(
            f"to(): this {type(pipe).__name__} {what}, which moves its weights. Load it again with device= and "
            f"torch_dtype="
        )
    if pipe.mesh.world.size > 1:
        raise PipelineError(
            f"to(): this {type(pipe).__name__} computes together with other processes, each on its device; move it "
            f"before parallel()"
        )


def _check_memory(modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Raise NotEnoughMemory if modules that are not on a device yet do not fit into its free memory."""
    coming = [tensor for module in modules for tensor in module.parameters() if tensor.device != device]
    needed = sum(tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in coming)
    free = devices.available_memory(device) if coming else None
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"to({str(device)!r}): the components need {needed / 2**30:.1f} GiB there, and {free / 2**30:.1f} GiB are "
            f"free. Nothing was moved. Use a smaller dtype, or load the model with vram_limit"
        )


class _Unloaded(Mapping[str, Any]):
    """The components of a pipeline that was unloaded: reading any raises PipelineError with a message.

    Args:
        message: of the error.
    """

    def __init__(self, message: str) -> None:
        self._message = message

    def _refuse(self, *_: Any) -> NoReturn:
        raise PipelineError(self._message)

    __getitem__ = __iter__ = __len__ = _refuse
