"""The check of a pipeline's call: what is found before anything runs, and what is only said."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffsynth.runtime.argument_types import ArgumentType, argument_types
from diffsynth.runtime.call_size import check_size
from diffsynth.runtime.effects import without_effect
from diffsynth.runtime.loop import check_loop
from diffsynth.runtime.request import Request, check_request
from diffsynth.runtime.role import config_of
from diffsynth.runtime.unit import check_values
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
        )
        check_size(self, request)
        check_values(self.program, self.components, self.known_values(request))
        if self.has_loop():
            check_loop(self, request)
        elif request.loop.output_type == "latents":
            raise ValueError(f"output_type='latents': {type(self).__name__} has no denoising loop; expected 'pil'")
        return request

    def arguments_without_effect(self: Any, **arguments: Any) -> dict[str, str]:
        """Return a dict argument -> reason of a call's arguments that change nothing, such as a negative prompt where
        guidance is off. The call logs each of them, and a record leaves them out. Errors are those of the call.

        Where the pipeline keeps a limit this makes the call's plan, which may turn tiles on.
        """
        return without_effect(self, self._planned_request(arguments), arguments)

    def log_arguments_without_effect(self: Any, request: Request, arguments: Mapping[str, Any]) -> None:
        """Log a warning for each argument of a checked call that changes nothing; see `arguments_without_effect`."""
        for name, reason in without_effect(self, request, arguments).items():
            logger.warning("%s has no effect: %s", name, reason)

    @functools.cached_property
    def _argument_types(self: Any) -> dict[str, ArgumentType]:
        return argument_types(type(self), self.program, self.__signature__, self.per_image)
