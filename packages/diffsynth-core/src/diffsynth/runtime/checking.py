"""The check of a pipeline's call: what is found before anything runs, and what is only said."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from diffsynth.runtime.argument_types import ArgumentType, argument_types
from diffsynth.runtime.call_size import check_size
from diffsynth.runtime.effects import arguments_read, without_effect
from diffsynth.runtime.loop import check_loop
from diffsynth.runtime.published_defaults import model_of_files, other_defaults
from diffsynth.runtime.request import LOOP_NAMES, LoopArguments, Request, check_request
from diffsynth.runtime.role import Processor, config_of
from diffsynth.runtime.unit import check_values
from diffsynth.spec import ModelSpec
from diffsynth.terminal import module_logger

logger = module_logger(__name__)


class CheckMethods:
    """The methods of `Pipeline` that check the arguments of a call without making it."""

    def check(self: Any, **arguments: Any) -> Request:
        """Check the arguments of a call without making it; return them, with defaults, as a `Request`.

        Errors are those of the call.
        """
        request = self.check_arguments(**arguments)
        configs = {role: config_of(part) for role, part in self.components.items()}
        values = self.known_values(request)
        for feature in self.features:
            if feature.check is not None:
                feature.check(configs, values)
        return request

    def check_arguments(self: Any, **arguments: Any) -> Request:
        """Check the arguments of a call as far as each can be checked by itself: names, ranges, roles, and those of the
        loop; return them as `check` does.
        """
        request = check_request(
            arguments,
            self.__signature__,
            self.program,
            self.components,
            per_image=self.per_image,
            check_value=lambda name, value: self._argument_types[name].check(value),
            instead=self.other_arguments,
            sources={role: need.source for role, need in self.roles.items() if isinstance(need, Processor)},
        )
        check_size(self, request)
        check_values(self.program, self.components, self.known_values(request))
        if self.has_loop():
            check_loop(self, request)
        elif request.loop.output_type == "latents":
            raise ValueError(f"output_type='latents': {type(self).__name__} has no denoising loop; expected 'pil'")
        return request

    def check_value(self: Any, name: str, value: Any) -> None:
        """Raise TypeError or ValueError for a value that an argument of a call does not take by itself.

        Args:
            name: of the argument.
            value: the value.
        """
        self._argument_types[name].check(value)
        if name in LOOP_NAMES:
            LoopArguments(**{name: value})

    def arguments_without_effect(self: Any, **arguments: Any) -> dict[str, str]:
        """Return a dict argument -> reason of a call's arguments that change nothing, such as a negative prompt where
        guidance is off. The call logs each of them, and a record leaves them out. Errors are those of the call.

        Where the pipeline keeps a limit this makes the call's plan, which may turn tiles on.
        """
        return without_effect(self, self._planned_request(arguments), arguments)

    def log_warnings(self: Any, request: Request, arguments: Mapping[str, Any]) -> None:
        """Log a warning for what a checked call does otherwise than its caller may think: arguments that change
        nothing, arguments left to a default that is not that of the model, and seeds of more bits than are read.
        """
        for name, reason in without_effect(self, request, arguments).items():
            logger.warning("%s has no effect: %s", name, reason)
        if (model := self._model_of_files) is not None:
            read = sorted(arguments_read(self, request) - arguments.keys() - self.lora_call_defaults.keys())
            for name, value in other_defaults(self, model, read).items():
                own = self.__signature__.parameters[name].default
                logger.warning(
                    "%s is %r, the default of the pipeline, but the files are those of %s, which has %r: pass %s, or "
                    "load the model by its name",
                    *(name, own, model.name, value, name),
                )
        on_cpu = torch.device(request.values.get("rand_device", "cpu")).type == "cpu"
        if on_cpu and (large := [seed for seed in request.seeds if seed is not None and seed >= 2**32]):
            logger.warning(
                "seed=%d: the generator of the CPU reads the lowest 32 bits, so the noise is that of seed=%d",
                *(large[0], large[0] % 2**32),
            )

    @functools.cached_property
    def _model_of_files(self: Any) -> ModelSpec | None:
        if self.model_name is not None:
            return None
        return model_of_files(
            type(self), [file for role in self.all_loop_roles for file in self.component_files.get(role, ())]
        )

    @functools.cached_property
    def _argument_types(self: Any) -> dict[str, ArgumentType]:
        return argument_types(type(self), self.program, self.__signature__, self.per_image)
