"""The memory plans that keep a pipeline's `vram_limit`: one for each kind of call, made before the first such call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from diffsynth.core.planning import MemoryPlan
from diffsynth.core.planning.workload import GIB
from diffsynth.runtime.request import HOST_ARGUMENTS, Request
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_SIZE_INDEPENDENT = HOST_ARGUMENTS | {"seed"}
"""Arguments that the memory of a call does not depend on."""


class PlanCache:
    """The plans of a pipeline's calls. Calls with equal sizes, counts and switches share one.

    Args:
        make_plan: from the arguments of a call to its plan, which keeps `vram_limit`.
        vram_limit: GiB on the device, for the log.
        per_image: names of the arguments that take a text or a list of texts; a plan counts the images only.
    """

    def __init__(
        self, make_plan: Callable[[Mapping[str, Any]], MemoryPlan], vram_limit: float, per_image: Collection[str]
    ) -> None:
        self._make_plan = make_plan
        self._limit = vram_limit
        self._ignored = _SIZE_INDEPENDENT | set(per_image)
        self._plans: dict[Any, MemoryPlan] = {}
        self._lock = threading.Lock()

    def plan(self, request: Request, arguments: Mapping[str, Any]) -> MemoryPlan:
        """Return the `MemoryPlan` of a call: made for the first call of equal sizes and switches, reused for later
        ones.

        Args:
            request: the checked call.
            arguments: of the call, as the caller passed them.

        Raises:
            NotEnoughMemory: the limit cannot be kept; the message has the smallest that can.
            Unplannable: the pipeline's code asks for values that only a real run has.
        """
        sized = {name: value for name, value in arguments.items() if name not in self._ignored}
        sized["num_images"] = request.batch_size
        key = frozenset((name, _size_key(value)) for name, value in sized.items())
        with self._lock:
            if key not in self._plans:
                self._plans[key] = self._make_plan(sized)
                self._log(self._plans[key])
            return self._plans[key]

    def clear(self) -> None:
        """Forget all plans, because the components take other memory than before."""
        with self._lock:
            self._plans.clear()

    def _log(self, plan: MemoryPlan) -> None:
        logger.info(
            "vram_limit=%s GiB: at most %.2f GiB, %.2f GB moved a step%s%s",
            self._limit,
            plan.peak_vram / GIB,
            plan.bytes_per_step / 1e9,
            f"; {', '.join(plan.evicted)} are offloaded between stages" if plan.evicted else "",
            "".join(f"; {name}={value!r}" for name, value in plan.switches.items()),
        )


def _size_key(value: Any) -> Any:
    """Return a hashable key of a value: itself if plain, a tuple with the size for an image or tensor, a tuple of keys
    for a list, a tuple, a dict or a dataclass, such as a `ControlNetInput`, else its type's name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Image.Image):
        return ("image", value.size)
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return tuple(sorted((str(name), _size_key(each)) for name, each in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_size_key, value))
    if is_dataclass(value):
        return (type(value).__qualname__, *(_size_key(getattr(value, each.name)) for each in fields(value)))
    return type(value).__qualname__
