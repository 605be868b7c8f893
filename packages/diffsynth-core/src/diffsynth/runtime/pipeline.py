"""The pipeline base class: components under roles, units before the denoising loop, the loop, and units after it."""

from __future__ import annotations

import functools
import inspect
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
from diffsynth.core.parallel import ProcessMesh, create_mesh
from diffsynth.core.planning import MemoryPlan
from diffsynth.core.vram.managed import managed
from diffsynth.core.vram.report import TransferReport
from diffsynth.errors import Cancelled, InvalidPipeline, MissingComponent, did_you_mean
from diffsynth.runtime.acceleration.compiling import compile_components
from diffsynth.runtime.acceleration.session import StepCacheSession, step_cache_session
from diffsynth.runtime.acceleration.step_attention import attention_at, check_attention
from diffsynth.runtime.added_units import with_added_units
from diffsynth.runtime.declared_backends import use_declared_backends
from diffsynth.runtime.guidance_branches import MERGES, Branches
from diffsynth.runtime.lora import LoRAMethods
from diffsynth.runtime.memory_options import MemoryOptions, Policies, choose, choose_before_reading
from diffsynth.runtime.plan_cache import PlanCache
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.pretrained import PretrainedLoader
from diffsynth.runtime.progress import no_progress
from diffsynth.runtime.request import LOOP_NAMES, LoopArguments, Request, Step, build_signature, check_request
from diffsynth.runtime.role import Processor, Role, fill_roles
from diffsynth.runtime.schema import SchemaMethod
from diffsynth.runtime.stage_offloader import ExpertSwitcher, StageOffloader
from diffsynth.runtime.unit import REQUIRED, CallValues, Program, Unit, can_run, check_units, needed_for, run_units
from diffsynth.sampling.guidance import classifier_free_guidance
from diffsynth.sampling.solver import euler

PIPELINE_VALUES = ("device", "dtype", "batch_size", "seeds", "mesh", *LOOP_NAMES)
"""The names that every pipeline sets for its units."""


class Pipeline(LoRAMethods):
    """A pipeline from the arguments of a call to images or videos; a family subclasses it.

    A subclass states its `roles`, `units`, `output_units`, the `loop_roles` that its `velocity()` calls, and
    `velocity()` itself. Units before the loop write `latents`, `sigmas` and the conditions that `velocity()` reads;
    those after it read `latents` and write `output`. `per_image` names the arguments that take a text or a list of
    texts. `facts` passes units a field of a component's config without loading the component: name -> "role.field".

    Threads: several threads may call one pipeline, and pipelines that share components, because all state of a call is
    in local values; each gets the result that it would get alone. Where components are under a policy, stages on one
    device run one at a time, because they move components. `named()` and changes of `components` must come before the
    first call. `on_step` runs in the caller's thread.
    """

    schema: ClassVar[SchemaMethod] = SchemaMethod()
    """`schema()` returns the arguments of a call as JSON Schema; see `diffsynth.runtime.schema`."""

    roles: ClassVar[Mapping[str, Role | Processor]] = MappingProxyType({})
    units: ClassVar[tuple[Unit, ...]] = ()
    output_units: ClassVar[tuple[Unit, ...]] = ()
    loop: ClassVar[LoopArguments] = LoopArguments()
    loop_roles: ClassVar[tuple[str, ...]] = ("dit",)
    per_image: ClassVar[tuple[str, ...]] = ("prompt", "negative_prompt")
    facts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    shares_tokens: ClassVar[bool] = False
    """Whether `velocity()` distributes the tokens among the processes of `self.mesh.tokens`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" not in vars(cls):
            cls.__call__ = _copy_of(cls.__call__)
        # inspect.signature(Class.__call__) shows the family's own arguments; instances add those of plugins.
        own = build_signature(check_units(cls.units, (*PIPELINE_VALUES, *cls.facts)), cls.loop, {})
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
            InvalidPipeline: units, roles and `velocity()` do not fit; the message names the unit.
            MissingComponent: a role that is not optional is left out.
            TypeError: a role that this pipeline does not have.
        """
        self.device = torch.device(device) if device is not None else devices.default_device()
        self.dtype = torch_dtype
        self.mesh = ProcessMesh()
        self.model_name: str | None = None
        self.component_files = {role: list(files) for role, files in (component_files or {}).items()}
        self.components = fill_roles(self.roles, components, pipeline_name=type(self).__name__)
        use_declared_backends()
        self.program = self.build_program()
        self._check_program()
        self.__signature__ = build_signature(self.program, self.loop, {})
        choose(self, MemoryOptions(self.device, torch_dtype, vram_limit, policy)).wrap_components(self.components)
        self._offloader = StageOffloader(self.components, self.device)
        self.plan_cache: PlanCache | None = None
        if vram_limit is not None and self.device.type != "cpu" and self._offloader.is_needed:
            make_plan = functools.partial(plan_call, self, device=self.device, vram_limit=vram_limit)
            self.plan_cache = PlanCache(make_plan, vram_limit, self.per_image)

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        model_configs: Sequence[Any] = (),
        vram_limit: float | None = None,
        *,
        policy: Policies = None,
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
            processor_configs: `<role>_config=ModelConfig(...)` in place of the default source of a processor.

        Raises:
            CheckpointError: a file is missing, corrupt, unknown, or of a role this pipeline does not have.
            MissingComponent: no file fills a role that the pipeline needs.
            TypeError: an unknown argument.
        """
        device = devices.default_device() if device is None else devices.check_device(device)
        loader = PretrainedLoader(cls.roles, cls.__name__, functools.partial(choose_before_reading, cls._from_some))
        memory = {"vram_limit": vram_limit, "policy": policy}
        components, files = loader.load(model_configs, processor_configs, dtype=torch_dtype, device=device, **memory)
        pipe = cls(components, device=device, torch_dtype=torch_dtype, component_files=files, **memory)
        _discovery.notify("pipeline_ready", pipeline=pipe)
        return pipe

    @classmethod
    def from_components(
        cls, *, device: torch.device | str | None = None, torch_dtype: torch.dtype = torch.bfloat16, **components: Any
    ) -> Pipeline:
        """Return a `Pipeline` of components by role; modules, unless wrapped, are moved to `device` and `torch_dtype`.

        Roles that are left out stay empty: a pipeline in training may hold an autoencoder alone.
        """
        pipe = cls._from_some(components, device=device, torch_dtype=torch_dtype)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module) and managed(part) is None:
                part.to(pipe.device, torch_dtype)
        return pipe

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
        self.model_name = name
        self.__signature__ = build_signature(self.program, self.loop, defaults)
        return self

    @torch.no_grad()
    def __call__(self, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        """Generate from a prompt; return an image or video, a list of several, or a tensor, according to `output_type`.

        `inspect.signature(pipe)` lists all arguments; `LoopArguments` documents those of the loop.

        Args:
            prompt: description of the image or video: a text, or a list of texts for several results.
            arguments: of units and the loop.

        Returns:
            one result for one prompt, a list (or a tensor `b ...`) for several prompts, images or seeds.
        """
        if prompt != "" or "prompt" in self.__signature__.parameters:
            arguments["prompt"] = prompt
        request = self._planned_request(arguments)
        try:
            return self._generate(request)
        finally:
            self._offloader.end_call(request.plan)

    @classmethod
    def call_signature(cls, defaults: Mapping[str, Any] | None = None) -> inspect.Signature:
        """Return the `inspect.Signature` of a call, with arguments of units that plugins add; nothing is loaded.

        Args:
            defaults: argument -> default of a model, in place of the class's.

        Raises:
            InvalidPipeline: units do not fit together.
        """
        return build_signature(cls.build_program(), cls.loop, defaults or {})

    @classmethod
    def build_program(cls) -> Program:
        """Return a checked `Program` of the class's units and of those that plugins add to it.

        Raises:
            InvalidPipeline: units do not fit together.
        """
        provided = (*PIPELINE_VALUES, *cls.facts)
        return check_units(with_added_units(cls, cls.units, roles=cls.roles, provided=provided), provided)

    def check(self, **arguments: Any) -> Request:
        """Check the arguments of a call without making it; return them, with defaults, as a `Request`.

        Errors are those of the call.
        """
        request = check_request(arguments, self.__signature__, self.program, self.components, per_image=self.per_image)
        self._step_cache_session(request)
        check_attention(request.loop.attention, self.device, self.dtype)
        loop = request.loop
        self.mesh.check_call(cfg_scale=loop.cfg_scale, step_cache=loop.step_cache, cancel=loop.cancel)
        return request

    def parallel(self, *, cfg: int = 1, sequence: int | None = None) -> Pipeline:
        """Set up the pipeline to compute calls together with the other processes of `torch.distributed`; return it.

        All processes must make the same calls.

        `docs/parallel.md` has the details.

        Args:
            cfg: 2 computes each branch of classifier-free guidance in processes of its own; 1 does not.
            sequence: number of processes that share the tokens of a branch; None is all. Must be 1 for a pipeline
                without `shares_tokens`.

        Raises:
            Unavailable: there is no process group.
            ValueError: sizes whose product is not the number of processes, or tokens that this pipeline cannot share.
        """
        mesh = create_mesh(cfg=cfg, sequence=sequence, device=self.device)
        if mesh.tokens.size > 1 and not self.shares_tokens:
            raise ValueError(
                f"{type(self).__name__} cannot share the tokens of a result among {mesh.tokens.size} processes; it can "
                f"share the two branches of guidance: parallel(cfg=2) with 2 processes"
            )
        self.mesh = mesh
        return self

    def compile_pipeline(
        self,
        mode: str | None = "default",
        dynamic: bool | None = True,
        fullgraph: bool = False,
        compile_models: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Set up `torch.compile` for the repeated blocks of the networks; each is compiled at its first call.

        Args:
            mode, dynamic, fullgraph, options: of `torch.compile`; with `dynamic` all sizes share one compiled code.
            compile_models: roles to compile; None is the roles that the loop calls. A component without repeated blocks
                is compiled whole.

        Raises:
            TypeError: an unknown role, one that holds no module, or an option that `torch.compile` does not have.
            MissingComponent: an empty role.
        """
        loaded = [role for role in self.loop_roles if self.components[role] is not None]
        roles = loaded if compile_models is None else compile_models
        compile_components(
            self.components, roles, **{"mode": mode, "dynamic": dynamic, "fullgraph": fullgraph, **options}
        )

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
        """Return a tensor `dx/dsigma = noise - x0` at a noise level, in the shape of `latents`; subclasses implement
        it.

        Args:
            latents: `b c h w` or `b c t h w`.
            sigma: noise levels, `b`, fp32, in [0, 1].
            conditions: what units wrote; a subclass names those that it reads as keyword-only parameters.
        """
        raise NotImplementedError

    def roles_at(self, sigma: float, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles (component names) that `velocity()` calls at a noise level; by default
        `loop_roles`.

        Args:
            sigma: noise level in (0, 1].
            values: the arguments of the call and what units wrote.
        """
        return self.loop_roles

    @classmethod
    def conditions(cls, *, required_only: bool = False) -> frozenset[str]:
        """Return a frozenset of the names that `velocity()` reads; only those without a default if `required_only`."""
        parameters = inspect.signature(cls.velocity).parameters.values()
        named = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
        return frozenset(each.name for each in named if not required_only or each.default is each.empty)

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
        provided = {"device": self.device, "dtype": self.dtype, "batch_size": batch_size, **self._fact_values()}
        call_values = CallValues(defaults | provided | dict(values))
        known = frozenset(call_values.shared) | frozenset(PIPELINE_VALUES) | frozenset(self.facts)
        run_units(check_units(units, known), self.components, call_values)
        return call_values.for_branch("cond")

    def condition_units(self, *also: str) -> tuple[Unit, ...]:
        """Return a tuple of the units, in running order, whose results are needed for `velocity()` and the names
        `also`.
        """
        return needed_for(self.program.units, {*self.conditions(), *also})

    def __getattr__(self, name: str) -> Any:
        """Return the component of a role, as in `pipe.dit` (None if empty); raise AttributeError for another name."""
        if name in type(self).roles:
            return self.components[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}{did_you_mean(name, type(self).roles)}")

    def call_values(self, request: Request) -> CallValues:
        """Return the `CallValues` that the units of a call start from: its arguments, and what the pipeline sets."""
        loop = {name: getattr(request.loop, name) for name in LOOP_NAMES}
        seeds = self.mesh.broadcast_seeds(request.seeds)
        provided = {"device": self.device, "dtype": self.dtype, "batch_size": request.batch_size, "seeds": seeds}
        provided |= {"mesh": self.mesh, **self._fact_values()}
        branches = ("cond",) if request.loop.cfg_scale == 1 else ("cond", "uncond")
        return CallValues({**request.values, **loop, **provided}, branches)

    def denoise(self, request: Request, values: CallValues) -> Tensor:
        """Run the denoising loop; return the latents at the end of the schedule, an fp32 tensor.

        Args:
            request: the checked call.
            values: of the call, after its units ran: `latents`, `sigmas` and conditions.
        """
        # Latents stay fp32: in bf16, steps near the end of the schedule would round most of their change away.
        sigmas, latents = values.shared["sigmas"], values.shared["latents"].float()
        num_steps = len(sigmas) - 1
        names = self.conditions()
        conditions = {
            branch: {name: value for name, value in values.for_branch(branch).items() if name in names}
            for branch in values.branches
        }

        step, cond = 0, values.for_branch("cond")
        roles = [self.roles_at(float(sigma), cond) for sigma in sigmas[:-1]]
        experts = ExpertSwitcher(self._offloader, roles, request.plan)
        step_cache = self._step_cache_session(request)
        branches = Branches(
            conditions,
            merges=cond.get(MERGES, False),
            batch_size=request.batch_size,
            axis=self.mesh.branches,
        )

        def predict(branch: str, latents: Tensor, levels: Tensor, conditions: Mapping[str, Any]) -> Tensor:
            is_last = step == num_steps - 1
            with (
                step_cache.forward_pass(branch, is_last=is_last),
                attention_at(request.loop.attention, step, num_steps),
            ):
                return self.velocity(latents, levels, **conditions).float()

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            _stop_if_cancelled(request)
            experts.begin_step()
            levels = sigma.to(self.device, torch.float32).expand(len(latents))
            predictions = branches.predict(predict, latents.to(self.dtype), levels)
            if len(predictions) == 1:
                return predictions[0]
            return classifier_free_guidance(*predictions, request.loop.cfg_scale)

        def on_step(index: int, latents: Tensor) -> None:
            nonlocal step
            step = index + 1
            sigma, sigma_next, reused = sigmas[index].item(), sigmas[index + 1].item(), step_cache.take_reused()
            self._notify("step_done", pipeline=self, step=index, num_steps=num_steps, sigma=sigma_next)
            if request.loop.on_step is not None:
                request.loop.on_step(Step(index, num_steps, sigma, sigma_next, latents, reused))

        self._notify("denoise_started", pipeline=self, num_steps=num_steps, shape=tuple(latents.shape))
        with experts, step_cache:
            progress = request.loop.progress_bar_cmd if self.mesh.is_main_process else no_progress
            return euler(velocity, latents, sigmas, on_step=on_step, progress=progress)

    def decode(self, request: Request, values: CallValues, latents: Tensor) -> Any:
        """Run the output units and return the value `output`; for a call of one result, the only item of a list.

        Args:
            request: the checked call.
            values: of the call; those that no output unit reads are deleted, to free their memory.
            latents: of the loop.

        Raises:
            MissingComponent: a role of an output unit is not loaded.
        """
        values.retain({read.name for step in self.output_units for read in step.reads})
        values.shared["latents"] = latents.to(self.dtype)
        if not all(can_run(step, self.components) for step in self.output_units):
            raise MissingComponent(f"{type(self).__name__} cannot decode; ask for output_type='latents'")
        program = Program(self.output_units, MappingProxyType({}), frozenset())
        run_units(program, self.components, values, around=functools.partial(self._stage, request))
        output = values.shared["output"]
        return output[0] if request.single and isinstance(output, list) else output

    @classmethod
    def _from_some(cls, components: Mapping[str, Any], **options: Any) -> Pipeline:
        """Return a `Pipeline` of `components` (role -> component) with its other roles left empty (None)."""
        return cls(dict.fromkeys(cls.roles) | dict(components), **options)

    def _check_program(self) -> None:
        """Raise InvalidPipeline for a unit or fact with an unknown role, or a required name that `velocity()`, the loop
        or an output unit reads and nothing sets.

        Raises:
            InvalidPipeline: naming the unit.
        """
        for step in (*self.program.units, *self.output_units):
            if unknown := {*step.roles, *step.requires} - set(self.roles):
                raise InvalidPipeline(f"unit {step.name!r} uses role {sorted(unknown)}, not one of {list(self.roles)}")
        for name, path in self.facts.items():
            if path.partition(".")[0] not in self.roles:
                raise InvalidPipeline(f"fact {name!r} is {path!r}; expected role.field with one of {list(self.roles)}")
        available = self.program.writes | set(self.program.arguments) | set(PIPELINE_VALUES) | set(self.facts)
        reads = {"velocity()": self.conditions(required_only=True), "the loop": {"latents", "sigmas"}}
        for step in self.output_units:
            reads[f"unit {step.name!r}"] = {read.name for read in step.reads if read.default is REQUIRED}
            available |= set(step.writes)
        for reader, names in reads.items():
            for name in sorted(names - available):
                raise InvalidPipeline(
                    f"{reader} of {type(self).__name__} reads {name!r}, which no unit writes"
                    f"{did_you_mean(name, available)}"
                )

    def _planned_request(self, arguments: Mapping[str, Any]) -> Request:
        """Return the checked `Request` of a call, with a `MemoryPlan` if the pipeline keeps a limit; it may turn tiles
        on.
        """
        request = self.check(**arguments)
        if self.plan_cache is None:
            return request
        plan = self.plan_cache.plan(request, arguments)
        if plan.tiled:
            request = self.check(**{**arguments, "tiled": True})
        return replace(request, plan=plan)

    def _generate(self, request: Request) -> Any:
        values = self.call_values(request)
        run_units(self.program, self.components, values, around=functools.partial(self._stage, request))
        latents = self.denoise(request, values)
        if request.loop.output_type == "latents":
            return latents
        return self.decode(request, values, latents)

    def _fact_values(self) -> dict[str, Any]:
        """Return a dict fact -> value of its config field, for components that are loaded; other facts are left out."""
        paths = {name: path.split(".") for name, path in self.facts.items()}
        loaded = {name: (self.components[role], field) for name, (role, field) in paths.items()}
        return {name: getattr(part.config, field) for name, (part, field) in loaded.items() if part is not None}

    @contextmanager
    def _stage(self, request: Request, step: Unit) -> Iterator[None]:
        _stop_if_cancelled(request)
        stage = "decode" if step in self.output_units else step.name
        with self._offloader.on_device(step.roles, stage, request.plan):
            yield

    def _step_cache_session(self, request: Request) -> StepCacheSession:
        return step_cache_session(request.loop.step_cache, self.components, self.loop_roles, self.model_name)

    def _notify(self, hook: str, **facts: Any) -> None:
        # Steps on meta belong to a plan, which observers must not take for a call.
        if self.device.type != "meta":
            _discovery.notify(hook, **facts)


def _copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `function`, a class's `__call__`, so that a subclass can have a signature of its
    own.
    """

    @functools.wraps(function)
    def call(self: Pipeline, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        return function(self, prompt, **arguments)

    return call


def _stop_if_cancelled(request: Request) -> None:
    if request.loop.cancel is not None and request.loop.cancel.is_set():
        raise Cancelled("the caller set `cancel`; no result")
