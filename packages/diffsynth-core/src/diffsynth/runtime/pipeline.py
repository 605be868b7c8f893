"""The pipeline base class: components under roles, units before the denoising loop, the loop, and units after it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsynth import _discovery
from diffsynth.core import device as devices
from diffsynth.core.parallel import ProcessMesh
from diffsynth.core.planning import MemoryPlan
from diffsynth.core.planning.workload import StageKind
from diffsynth.core.progress import OnProgress, reporting
from diffsynth.core.torch_defaults import torch_defaults
from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.report import TransferReport
from diffsynth.errors import InvalidPipeline, did_you_mean
from diffsynth.runtime.background import BackgroundMethods
from diffsynth.runtime.checking import CheckMethods
from diffsynth.runtime.composition import PIPELINE_VALUES, RESERVED, compose, own_program, own_roles
from diffsynth.runtime.computing import ComputeMethods
from diffsynth.runtime.copying import CopyMethods
from diffsynth.runtime.declared_backends import use_declared_backends
from diffsynth.runtime.feature import Condition, Feature, StepContext
from diffsynth.runtime.images import check_output
from diffsynth.runtime.lifetime import LifetimeMethods, move
from diffsynth.runtime.lora import LoRAMethods
from diffsynth.runtime.memory_options import MemoryOptions, Policies, choose, choose_before_reading
from diffsynth.runtime.plan_cache import PlanCache
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.pretrained import PretrainedLoader
from diffsynth.runtime.preview import PreviewMethods
from diffsynth.runtime.recorded import recorded, with_drawn_seed
from diffsynth.runtime.request import LOOP_NAMES, LoopArguments, Request, build_signature, refuse_meta
from diffsynth.runtime.role import Agreement, Processor, Role, check_components, fill_roles, member_roles, members
from diffsynth.runtime.running_calls import RunningCalls
from diffsynth.runtime.schema import SchemaMethod
from diffsynth.runtime.stage_offloader import ExpertSwitcher, StageOffloader
from diffsynth.runtime.stages import Stage, run_stages, stages_of
from diffsynth.runtime.unit import CallValues, Program, Unit, check_units, needed_for, run_units
from diffsynth.sampling.prediction import PREDICTIONS


class Pipeline(
    CheckMethods, LoRAMethods, ComputeMethods, BackgroundMethods, LifetimeMethods, PreviewMethods, CopyMethods
):
    """A pipeline from the arguments of a call to images, videos or any other output; a family subclasses it.

    A subclass states its `roles`, `units`, `output_units`, the `loop_roles` that its `velocity()` calls, and
    `velocity()` itself; each further conditioning is one of its `features`. Units before the loop write `latents`,
    `sigmas` and the conditions that `velocity()` reads; those after it read `latents` and write `output`. A subclass
    without `velocity()` and `predict()` has no loop: its units write what its output units read.

    Threads: several threads may call one pipeline, and pipelines that share components, because all state of a call is
    in local values; each gets the result that it would get alone. Where components are under a policy, stages on one
    device run one at a time, because they move components. `named()` and changes of `components` must come before the
    first call. `on_step` runs in the caller's thread.
    """

    schema: ClassVar[SchemaMethod] = SchemaMethod()
    """`schema()` returns the arguments of a call as JSON Schema; see `diffsynth.runtime.schema`."""

    roles: Mapping[str, Role | Processor] = MappingProxyType({})
    """The roles of the pipeline itself; those of features are added."""

    units: ClassVar[tuple[Unit, ...]] = ()
    output_units: ClassVar[tuple[Unit, ...]] = ()
    features: tuple[Feature, ...] = ()
    loop: ClassVar[LoopArguments] = LoopArguments()
    """The defaults of the loop's arguments."""

    loop_roles: ClassVar[tuple[str, ...]] = ("dit",)
    """The roles whose networks `velocity()` calls, besides those of features."""

    conditions: ClassVar[Mapping[str, Condition]] = MappingProxyType({})
    """Name -> `Condition` of values that `velocity()` reads, besides those of features. One that is not listed is
    stacked for guidance in one batch, and refuses sliding windows."""

    per_image: tuple[str, ...] = ("prompt", "negative_prompt")
    """The arguments that take one value, or a list of one for each result."""

    other_arguments: Mapping[str, str] = MappingProxyType({})
    """Argument that users of other programs know and this pipeline does not take -> what takes its place, for the
    error; those of features are added."""

    facts: Mapping[str, str] = MappingProxyType({})
    """Name -> "role.field": a field of a component's config that units read without the component being loaded."""

    agreements: ClassVar[tuple[Agreement, ...]] = ()
    """The fields of the components' configs that must be equal, or the components do not fit each other."""

    prediction: ClassVar[str] = "velocity"
    """The kind of result of `predict()`: "epsilon", "x0" or "v"; "velocity" if the class implements `velocity()`."""

    shares_tokens: ClassVar[bool] = False
    """Whether `velocity()` distributes the tokens among the processes of `self.mesh.tokens`."""

    output_kind: ClassVar[str | None] = None
    """The kind of output: "image", "video", "audio" or another word; None if it depends on the call."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.prediction not in PREDICTIONS:
            raise InvalidPipeline(
                f"{cls.__name__}.prediction is {cls.prediction!r}{did_you_mean(cls.prediction, PREDICTIONS)}; "
                f"expected one of {', '.join(PREDICTIONS)}"
            )
        cls.roles = MappingProxyType(own_roles(cls))
        cls.other_arguments = MappingProxyType(_other_arguments(cls.other_arguments, cls.features))
        if "__call__" not in vars(cls):
            cls.__call__ = _copy_of(cls.__call__)
        # inspect.signature(Class.__call__) shows the family's own arguments; instances add those of plugins.
        own = build_signature(own_program(cls), cls.loop, {}, has_loop=cls.has_loop())
        subject = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        cls.__call__.__signature__ = own.replace(parameters=[subject, *own.parameters.values()])

    def __init__(
        self,
        components: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        torch_dtype: torch.dtype = torch.bfloat16,
        vram_limit: float | None = None,
        policy: Policies = None,
        component_files: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """Make a pipeline of components, and check that units, roles and `velocity()` fit together.

        Args:
            components: role -> module, processor or None.
            device: the device that computes; None picks the first accelerator, else the CPU.
            torch_dtype: of activations.
            vram_limit, policy: see `from_pretrained`.
            component_files: role -> the files that the component was read from, for records.

        Raises:
            InvalidPipeline: units, roles and `velocity()` do not fit, the message names the unit; or components that do
                not fit each other, their roles or the dtype.
            MissingComponent: a role that is not optional is left out.
            TypeError: a role that this pipeline does not have, a path or config in place of a component, or a dtype
                that is no floating-point `torch.dtype`.
        """
        self.device = torch.device(device) if device is not None else devices.default_device()
        self.dtype = devices.check_floating(torch_dtype)
        self.vram_limit, self.size_limits = vram_limit, None
        self.mesh = ProcessMesh()
        self.running_calls = RunningCalls()
        self.model_name: str | None = None
        self.model_defaults: Mapping[str, Any] = {}
        self.component_files = {role: list(files) for role, files in (component_files or {}).items()}
        use_declared_backends()
        made = compose(type(self))
        self.features, self.roles, self.facts, self.per_image = made.features, made.roles, made.facts, made.per_image
        self.other_arguments = _other_arguments(self.other_arguments, self.features)
        self.program, self.condition_rules = made.program, made.conditions
        self._velocity_parameters, self._all_loop_roles = made.parameters, made.loop_roles
        name = type(self).__name__
        agreeing = {"facts": self.facts, "agreements": made.agreements}
        self.components = fill_roles(self.roles, components, **agreeing, pipeline_name=name)
        check_components(self.roles, self.components, dtype=torch_dtype, pipeline_name=name)
        self.follow_defaults()
        choose(self, MemoryOptions(self.device, torch_dtype, vram_limit, policy)).wrap_components(self.parts)
        self._follow_wrapped()
        self.plan_cache: PlanCache | None = None
        if vram_limit is not None and self.device.type != "cpu" and self._offloader.is_needed:
            make_plan = functools.partial(plan_call, self, device=self.device, vram_limit=vram_limit)
            self.plan_cache = PlanCache(make_plan, vram_limit, self.per_image)

    @classmethod
    @torch_defaults()
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        model_configs: Sequence[Any] = (),
        vram_limit: float | None = None,
        *,
        policy: Policies = None,
        on_progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
        **processor_configs: Any,
    ) -> Pipeline:
        """Return a `Pipeline` whose components are loaded from files.

        Args:
            torch_dtype: of parameters and activations.
            device: the device that computes; None picks the first accelerator, else the CPU.
            model_configs: a `ModelConfig` for each checkpoint, in any order; each is recognised by its content.
            vram_limit: GiB that a call may take on the device; None is no limit, 0 keeps no weights resident.
            policy: where and in which dtype weights are offloaded: a preset's name such as "cpu-offload", "fp8" or
                "disk", or a `diffsynth.core.vram.policy.Policy`, for all components or by role. "auto" chooses the
                dtype by a plan of the default call, `Auto(arguments)` by a plan of the call with these arguments. The
                eight keys of a config have precedence.
            on_progress, cancel: see `diffsynth.load`.
            processor_configs: `<role>_config=ModelConfig(...)` in place of the default source of a processor.

        Raises:
            CheckpointError: a file is missing, corrupt, unknown, or of a role this pipeline does not have.
            MissingComponent: no file fills a role that the pipeline needs.
            InvalidPipeline: two files that do not fit each other; no weights are read by then.
            Cancelled: the caller set `cancel`.
            TypeError: an unknown argument, or a dtype that is no floating-point `torch.dtype`.
        """
        device = devices.default_device() if device is None else devices.check_device(device)
        devices.check_floating(torch_dtype)
        made = compose(cls)
        choose_policy = functools.partial(choose_before_reading, cls._from_some)
        fitting = {"agreements": made.agreements, "features": made.features}
        loader = PretrainedLoader(made.roles, cls.__name__, choose_policy, **fitting)
        memory = {"vram_limit": vram_limit, "policy": policy}
        with reporting(on_progress, cancel=cancel):
            components, files = loader.load(
                model_configs, processor_configs, dtype=torch_dtype, device=device, **memory
            )
        pipe = cls(components, device=device, torch_dtype=torch_dtype, component_files=files, **memory)
        _discovery.notify("pipeline_ready", pipeline=pipe)
        return pipe

    @classmethod
    def from_components(
        cls, *, device: torch.device | str | None = None, torch_dtype: torch.dtype = torch.bfloat16, **components: Any
    ) -> Pipeline:
        """Return a `Pipeline` of components by role; modules, unless wrapped, are moved to `device` and `torch_dtype`.

        Roles that are left out stay empty: a pipeline in training may hold an autoencoder alone.

        Raises:
            InvalidPipeline, TypeError: as for the constructor.
        """
        chosen = devices.default_device() if device is None else devices.check_device(device)
        devices.check_floating(torch_dtype)
        for part in members(components).values():
            if isinstance(part, torch.nn.Module) and managed(part) is None:
                move(part, chosen, torch_dtype)
        return cls._from_some(components, device=chosen, torch_dtype=torch_dtype)

    def _follow_wrapped(self) -> None:
        self._offloader = StageOffloader(self.parts, self.device)

    @property
    def transfers(self) -> Mapping[str, TransferReport]:
        """A mapping role -> `TransferReport` (printable) of weight transfers so far, of components under a policy."""
        return self._offloader.reports

    def named(self, name: str, defaults: Mapping[str, Any]) -> Pipeline:
        """Set the model's name and its defaults of call arguments in the pipeline; return the pipeline itself.

        Args:
            name: of the model.
            defaults: argument -> default, in place of the class's.

        Raises:
            TypeError: a default for an argument that this pipeline does not have.
        """
        known = {*self.program.arguments, *LOOP_NAMES}
        for argument in defaults:
            if argument not in known:
                raise TypeError(f"model {name!r} sets default {argument!r}, no argument{did_you_mean(argument, known)}")
        self.model_name, self.model_defaults = name, dict(defaults)
        self.follow_defaults()
        return self

    def follow_defaults(self) -> None:
        """Make `inspect.signature` of the pipeline, whose defaults calls have, anew: of the class, the model, and
        loaded LoRAs, of which the later ones have precedence.
        """
        defaults = {**self.model_defaults, **self.lora_call_defaults}
        self.__signature__ = build_signature(self.program, self.loop, defaults, has_loop=self.has_loop())

    @torch_defaults()
    @torch.no_grad()
    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        """Generate from a prompt; return an image or video, a list of several, or a tensor, according to `output_type`.

        `inspect.signature(pipe)` lists all arguments; `LoopArguments` documents those of the loop.

        Args:
            prompt: description of the image or video: a text, or a list of texts for several results.
            arguments: of units and the loop.

        Returns:
            one result for one prompt, a list (or a tensor `b ...`) for several prompts, images or seeds; with
            `return_record` a `RecordedOutput` of it.

        Raises:
            NotFinite: latents or decoded values hold NaN or infinity.
        """
        if not (isinstance(prompt, str) and prompt == "") or "prompt" in self.__signature__.parameters:
            arguments["prompt"] = prompt
        if self.device.type != "meta":
            refuse_meta(arguments)
        with self.running_calls.entered():
            arguments = with_drawn_seed(self, arguments)
            request = self._planned_request(arguments)
            self.log_warnings(request, arguments)
            output = self._run(request)
            return recorded(self, request, arguments, output) if request.loop.return_record else output

    def _run(self, request: Request) -> Any:
        values = self.call_values(request)
        try:
            run_stages(self.stages(request), values, request, loaded=lambda stage: self._loaded(stage, request))
        finally:
            self._offloader.end_call(request.plan)
        if request.loop.output_type == "latents":
            return values.shared["latents"]
        output = values.shared["output"]
        check_output(output)
        return output[0] if request.single and isinstance(output, list) else output

    @classmethod
    def call_signature(cls, defaults: Mapping[str, Any] | None = None) -> inspect.Signature:
        """Return the `inspect.Signature` of a call, with arguments of features that plugins add; nothing is loaded.

        Args:
            defaults: argument -> default of a model, in place of the class's.

        Raises:
            InvalidPipeline: units do not fit together.
        """
        return build_signature(cls.build_program(), cls.loop, defaults or {}, has_loop=cls.has_loop())

    @classmethod
    def build_program(cls) -> Program:
        """Return a checked `Program` of the units of the class and of its features, those of plugins included.

        Raises:
            InvalidPipeline: units do not fit together.
        """
        return compose(cls).program

    @classmethod
    def has_loop(cls) -> bool:
        """Whether the pipeline has a denoising loop: its class implements `velocity()` or `predict()`."""
        return cls.velocity is not Pipeline.velocity or cls.predict is not Pipeline.predict

    @property
    def parts(self) -> dict[str, Any]:
        """A dict role -> component or None, with one entry for each member of a role of many: "controlnet[0]"."""
        return members(self.components)

    @property
    def all_loop_roles(self) -> tuple[str, ...]:
        """A tuple of the roles whose networks the loop may call, those of features and members of roles of many
        included.
        """
        return member_roles(self._all_loop_roles, self.components)

    def stages(self, request: Request) -> list[Stage]:
        """Return a list of the `Stage`s of a call in running order: units, the denoising loop, and output units.

        Args:
            request: the checked call, see `check`.

        Raises:
            MissingComponent: a role of an output unit is not loaded and not optional, and the call asks for its output.
        """
        return stages_of(self, request)

    @torch_defaults()
    def plan(
        self,
        *,
        vram_limit: float | None = None,
        ram_limit: float | None = None,
        policy: str | None = None,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> MemoryPlan:
        """Return the `MemoryPlan` of a call (memory by stage, transfers, seconds) without making the call.

        Args:
            vram_limit, ram_limit: GiB to plan for, see `plan_memory`; the limit of this pipeline is not used.
            policy: a preset, or "auto", to plan for; None is the policies of the components.
            device: that the call is meant for; None is the pipeline's. It need not be in this machine.
            arguments: of the call. Without a prompt one of 512 tokens is assumed.

        Raises:
            TypeError, ValueError: an argument that the call would refuse, too.
            NotEnoughMemory: a limit cannot be kept; the message has the smallest that can.
            Unplannable: the code asks for values that only a real run has.
        """
        limits = {"vram_limit": vram_limit, "ram_limit": ram_limit, "policy": policy}
        return plan_call(self, arguments, device=self.device if device is None else device, **limits)

    def velocity(self, latents: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        """Return a tensor `dx/dsigma = noise - x0` at a noise level, in the shape of `latents`; subclasses whose
        `prediction` is "velocity" implement it, for others it adapts what `predict()` returns.

        A subclass names the conditions that it reads as keyword-only parameters. Two names are reserved: `step` is the
        `StepContext`, and `extensions` a tuple of the conditions that are no parameters.

        Args:
            latents: `b c h w`, `b c t h w`, or of another shape that units write, such as `b c n` for sound.
            sigma: noise levels, `b`, fp32, in [0, 1].
            conditions: what units wrote.
        """
        adapter = PREDICTIONS[self.prediction]
        output = self.predict(adapter.scale_input(latents, sigma).to(self.dtype), sigma, **conditions)
        return adapter.to_velocity(latents, sigma, output.float())

    def predict(self, latents: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        """Return what the network predicts, a tensor in the shape of `latents`; subclasses whose `prediction` is not
        "velocity" implement it. The arguments are those of `velocity()`.

        Args:
            latents: of the noise level; for "epsilon" and "v" scaled to constant variance, as in
                `diffsynth.sampling.prediction.variance_preserving`.
            sigma: noise levels, `b`, fp32, in [0, 1].
            conditions: what units wrote.
        """
        raise NotImplementedError

    def step_outside(self, sigma: Tensor) -> StepContext:
        """Return a `StepContext` for a call of `velocity()` outside of a loop, such as in training.

        Args:
            sigma: noise levels `b`; the first is that of the step, which waits for the device.
        """
        return StepContext(float(sigma[0]), networks=self.components)

    def velocity_arguments(self, conditions: Mapping[str, Any], step: StepContext | None = None) -> dict[str, Any]:
        """Return a dict of the keyword arguments of `velocity()`: conditions by name, and the others as `extensions`.

        Args:
            conditions: name -> value; names that are no conditions are left out.
            step: the step of the loop; None outside of a loop.
        """
        named = self._velocity_parameters
        arguments = {name: conditions[name] for name in named if name in conditions and name not in RESERVED}
        if "extensions" in named:
            rules = self.condition_rules.items()
            others = (conditions.get(name) for name, rule in rules if name not in named and rule.constrain is None)
            arguments["extensions"] = tuple(value for value in others if value is not None)
        if "step" in named and step is not None:
            arguments["step"] = step
        return arguments

    def roles_at(self, step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles (component names) whose networks `velocity()` calls in a step: by default
        `loop_roles`, and those of the features in use.

        Args:
            step: the step.
            values: the arguments of the call and what units wrote.
        """
        roles = (*self.loop_roles, *(role for each in self.features for role in each.roles_in(step, values)))
        return member_roles(dict.fromkeys(roles), self.components)

    def run_units(self, units: Sequence[Unit], values: Mapping[str, Any]) -> dict[str, Any]:
        """Run `units` on the branch `cond`; return a dict name -> value of arguments, their defaults and all results.
        Units whose role is not loaded or whose `only_with` is None are skipped.

        Args:
            units: some of `self.units`, in order; see `needed_for` and `split`.
            values: arguments and earlier results; arguments that are left out take their defaults.

        Returns:
            all values after the last unit.
        """
        defaults = {name: parameter.default for name, parameter in self.__signature__.parameters.items()}
        batch_size = max((len(values[name]) for name in self.per_image if name in values), default=1)
        provided = {"device": self.device, "dtype": self.dtype, "batch_size": batch_size, **self.fact_values()}
        call_values = CallValues(defaults | provided | dict(values))
        known = frozenset(call_values.shared) | frozenset(PIPELINE_VALUES) | frozenset(self.facts)
        run_units(check_units(units, known).units, self.components, call_values)
        return call_values.for_branch("cond")

    def condition_units(self, *also: str) -> tuple[Unit, ...]:
        """Return a tuple of the units, in running order, whose results are needed for `velocity()` and the names
        `also`.
        """
        return needed_for(self.program.units, {*self.condition_rules, *also})

    def __getattr__(self, name: str) -> Any:
        """Return the component of a role, as in `pipe.dit` (None if empty); raise AttributeError for another name."""
        roles = vars(self).get("roles", {})
        if name in roles:
            return self.components[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}{did_you_mean(name, roles)}")

    def call_values(self, request: Request) -> CallValues:
        """Return the `CallValues` that the units of a call start from: its arguments, and what the pipeline sets."""
        seeds = self.mesh.broadcast_seeds(request.seeds)
        return CallValues({**self.known_values(request), "seeds": seeds}, request.branches)

    def known_values(self, request: Request) -> dict[str, Any]:
        """Return a dict name -> value of what is known of a call before anything runs: its arguments, those of the loop
        included, `batch_size`, `device`, `dtype`, `mesh` and the facts of loaded components. Checks of units and
        features are called with it.
        """
        provided = {"device": self.device, "dtype": self.dtype, "batch_size": request.batch_size, "mesh": self.mesh}
        return {**request.arguments, **provided, **self.fact_values()}

    def switch_experts(self, roles: Sequence[tuple[str, ...]], plan: MemoryPlan | None) -> ExpertSwitcher:
        """Return an `ExpertSwitcher` that loads the components of each step of the loop.

        Args:
            roles: those of each step, in order.
            plan: of the call, if there is one.
        """
        return ExpertSwitcher(self._offloader, roles, plan)

    @classmethod
    def _from_some(cls, components: Mapping[str, Any], **options: Any) -> Pipeline:
        """Return a `Pipeline` of `components` (role -> component) with its other roles left empty (None)."""
        return cls(dict.fromkeys(compose(cls).roles) | dict(components), **options)

    def _planned_request(self, arguments: Mapping[str, Any]) -> Request:
        """Return the checked `Request` of a call, with a `MemoryPlan` if the pipeline keeps a limit; the plan may set
        arguments that lower the memory.
        """
        request = self.check(**arguments)
        if self.plan_cache is None:
            return request
        plan = self.plan_cache.plan(request, arguments)
        if plan.switches:
            request = self.check(**{**arguments, **plan.switches})
        return replace(request, plan=plan)

    def fact_values(self) -> dict[str, Any]:
        """Return a dict fact -> value of its config field, for components that are loaded; other facts are left out."""
        found: dict[str, Any] = {}
        for name, path in self.facts.items():
            role, field = path.split(".")
            part = self.components[role]
            if isinstance(part, tuple):
                found[name] = tuple(getattr(each.config, field) for each in part)
            elif part is not None:
                found[name] = getattr(part.config, field)
        return found

    @contextmanager
    def _loaded(self, stage: Stage, request: Request) -> Iterator[None]:
        if stage.kind is StageKind.DENOISE:  # its steps load their components themselves
            yield
            return
        with self._offloader.on_device(member_roles(stage.roles, self.components), stage.name, request.plan):
            yield


def _other_arguments(own: Mapping[str, str], features: Sequence[Feature]) -> dict[str, str]:
    """Return a dict argument -> what takes its place, of a pipeline and its features."""
    return {**own, **{name: text for feature in features for name, text in feature.other_arguments.items()}}


def _copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `function`, a class's `__call__`, so that a subclass can have a signature of its
    own.
    """

    @functools.wraps(function)
    def call(self: Pipeline, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        return function(self, prompt, **arguments)

    return call
