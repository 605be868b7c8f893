"""The pipeline base class: components under roles, units before the loop, the loop, units after it."""

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
from diffsynth.errors import Cancelled, MissingComponent, did_you_mean
from diffsynth.runtime.acceleration.branches import MERGES, Branches
from diffsynth.runtime.acceleration.caching import step_cache_session
from diffsynth.runtime.acceleration.compiling import compile_components
from diffsynth.runtime.acceleration.session import StepCacheSession
from diffsynth.runtime.acceleration.step_attention import attention_at, check_attention
from diffsynth.runtime.added_units import with_added_units
from diffsynth.runtime.declared_backends import use_declared_backends
from diffsynth.runtime.expert_switcher import ExpertSwitcher
from diffsynth.runtime.lora import LoRAMethods
from diffsynth.runtime.memory_options import MemoryOptions, Policies
from diffsynth.runtime.plan_cache import PlanCache
from diffsynth.runtime.planning import plan_call
from diffsynth.runtime.policy_choice import choose, choose_before_reading
from diffsynth.runtime.pretrained import PretrainedLoader
from diffsynth.runtime.progress import no_progress
from diffsynth.runtime.request import LOOP_NAMES, LoopArguments, Request, Step, build_signature, check_request
from diffsynth.runtime.role import Processor, Role, check_program, fill_roles
from diffsynth.runtime.schema import SchemaMethod
from diffsynth.runtime.stage_offloader import StageOffloader
from diffsynth.runtime.unit import CallValues, Program, Unit, can_run, check_units, needed_for, run_units
from diffsynth.sampling.guidance import classifier_free_guidance
from diffsynth.sampling.solver import euler

GIVEN = ("device", "dtype", "batch_size", "seeds", "mesh", *LOOP_NAMES)
"""Names that every pipeline gives its units, besides what they write for each other."""


class Pipeline(LoRAMethods):
    """A family's way from arguments to pictures.

    A subclass states `roles`, `units`, `output_units`, the `loop_roles` that its `velocity()` calls, and `velocity()`
    itself; everything else follows. Units before the loop write `latents`, `sigmas` and whatever `velocity()` names;
    those after it read `latents` and write `output`. `per_image` names the arguments that take a text or a list.
    `facts` gives units a field of a component's config without moving the component: name -> "role.field".

    Threads: a call keeps all its state in local values, so several threads may call one pipeline, and pipelines that
    share components, and each gets the picture that it would get alone. Where components are under a policy, stages on
    one device take turns, because they move components. `named()` and changes of `components` are for before the first
    call. `on_step` runs in the caller's thread.
    """

    schema: ClassVar[SchemaMethod] = SchemaMethod()
    """`schema()`: the arguments of a call as JSON Schema; see `diffsynth.runtime.schema`."""

    roles: ClassVar[Mapping[str, Role | Processor]] = MappingProxyType({})
    units: ClassVar[tuple[Unit, ...]] = ()
    output_units: ClassVar[tuple[Unit, ...]] = ()
    loop: ClassVar[LoopArguments] = LoopArguments()
    loop_roles: ClassVar[tuple[str, ...]] = ("dit",)
    per_image: ClassVar[tuple[str, ...]] = ("prompt", "negative_prompt")
    facts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    shares_tokens: ClassVar[bool] = False
    """Whether `velocity()` shares the tokens out among the processes of `self.mesh.tokens`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" not in vars(cls):
            cls.__call__ = _own_copy(cls.__call__)
        # Shows the family's own arguments to inspect.signature(Class.__call__); instances add those of plugins.
        own = build_signature(check_units(cls.units, (*GIVEN, *cls.facts)), cls.loop, {})
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
        """Hold components and check that units, roles and `velocity()` fit together.

        Raises:
            InvalidPipeline: they do not; the message names the unit.
            MissingComponent: a role that is not optional is empty.
            TypeError: a role that this pipeline does not have.
        """
        self.device = torch.device(device) if device is not None else devices.default_device()
        self.dtype = torch_dtype
        self.mesh = ProcessMesh()
        self.model_name: str | None = None
        self.component_files = {role: list(files) for role, files in (component_files or {}).items()}
        self.components = fill_roles(type(self), components)
        use_declared_backends()
        self.program = self._whole_program()
        check_program(type(self), self.program, GIVEN)
        self.__signature__ = build_signature(self.program, self.loop, {})
        choose(self, MemoryOptions(self.device, torch_dtype, vram_limit, policy)).hold(self.components)
        self._offloader = StageOffloader(self.components, self.device)
        keeps = vram_limit is not None and self.device.type != "cpu" and self._offloader.is_needed
        self._limit = PlanCache(self, vram_limit, self.device) if keeps else None

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
        """Load every component from files.

        Args:
            torch_dtype: of parameters and activations.
            device: where to compute; None picks the first accelerator, else the CPU.
            model_configs: a `ModelConfig` per checkpoint, in any order; each is recognised by its content.
            vram_limit: GiB that a call may take on the device; None is no limit, 0 keeps no weights there.
            policy: where weights wait, by a preset's name, "cpu-offload", "fp8", "disk", for all components or for each
                role; see `diffsynth.core.vram.policy.Policy`. "auto" leaves their dtype to a plan of the default
                call, `Auto(arguments)` to one of another. A config's own eight keys have precedence.
            processor_configs: `<role>_config=ModelConfig(...)` in place of a processor's usual source.

        Raises:
            CheckpointError: a file is missing, corrupt, unknown, or of a role this pipeline does not have.
            MissingComponent: no file fills a role that the pipeline needs.
            TypeError: an unknown argument.
        """
        device = devices.default_device() if device is None else devices.check_device(device)
        loader = PretrainedLoader(cls.roles, cls.__name__, functools.partial(choose_before_reading, cls))
        memory = {"vram_limit": vram_limit, "policy": policy}
        components, files = loader.load(model_configs, processor_configs, dtype=torch_dtype, device=device, **memory)
        pipe = cls(components, device=device, torch_dtype=torch_dtype, component_files=files, **memory)
        _discovery.notify("pipeline_ready", pipeline=pipe)
        return pipe

    @classmethod
    def from_components(
        cls, *, device: torch.device | str | None = None, torch_dtype: torch.dtype = torch.bfloat16, **components: Any
    ) -> Pipeline:
        """Put together modules that are in memory already, under their roles; they move to `device` and `torch_dtype`.

        Roles left out stay empty: a pipeline in training may hold an autoencoder alone.
        """
        empty = dict.fromkeys(cls.roles)
        pipe = cls(empty | components, device=device, torch_dtype=torch_dtype)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module) and managed(part) is None:
                part.to(pipe.device, torch_dtype)
        return pipe

    @property
    def transfers(self) -> Mapping[str, TransferReport]:
        """What moving the weights of each component under a policy cost so far; a report prints itself."""
        return self._offloader.reports

    def named(self, name: str, defaults: Mapping[str, Any]) -> Pipeline:
        """Make this the pipeline of a model: its name, and the call arguments it wants other than the class does.

        Raises:
            TypeError: a default that is no argument of this pipeline.
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
        """Draw. `inspect.signature(pipe)` lists the arguments, `LoopArguments` documents those of the loop.

        Args:
            prompt: what to draw: a text, or a list of texts for several results.
            arguments: of units and the loop.

        Returns:
            one result for one prompt, a list (or a tensor `b ...`) for several prompts, images or seeds.
        """
        if prompt != "" or "prompt" in self.__signature__.parameters:
            arguments["prompt"] = prompt
        request = self._planned(arguments)
        try:
            return self._draw(request)
        finally:
            self._offloader.rest(request.plan)

    @classmethod
    def call_signature(cls, defaults: Mapping[str, Any] | None = None) -> inspect.Signature:
        """The arguments of a call, those of units that plugins add included; nothing has to be loaded.

        Args:
            defaults: a model's own, over the class's.

        Raises:
            InvalidPipeline: units do not fit together.
        """
        return build_signature(cls._whole_program(), cls.loop, defaults or {})

    def check(self, **arguments: Any) -> Request:
        """Check the arguments of a call without making it; raises what the call would raise for them."""
        request = check_request(arguments, self.__signature__, self.program, self.components, per_image=self.per_image)
        self._step_cache_session(request)
        check_attention(request.loop.attention, self.device, self.dtype)
        loop = request.loop
        self.mesh.check_call(cfg_scale=loop.cfg_scale, step_cache=loop.step_cache, cancel=loop.cancel)
        return request

    def parallel(self, *, cfg: int = 1, sequence: int | None = None) -> Pipeline:
        """Draw together with the other processes of `torch.distributed`, which make the same calls; `docs/parallel.md`.

        Args:
            cfg: 2 gives each branch of classifier-free guidance processes of its own, which every pipeline can.
            sequence: how many processes share the tokens of a branch; None is all. 1 for a pipeline that cannot.

        Raises:
            Unavailable: there is no process group.
            ValueError: sizes that do not make up the number of processes, or tokens that this pipeline cannot share.
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
        """Have the repeated blocks of the networks compiled by `torch.compile` when they are first called.

        Args:
            mode, dynamic, fullgraph, options: of `torch.compile`; `dynamic` lets one code serve every size.
            compile_models: roles; None is those that the loop calls. Without repeated blocks a role is compiled whole.

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
        """What a call with these arguments would take, without making it: memory by stage, transfers, seconds.

        Args:
            vram_limit, ram_limit: GiB to plan for, see `plan_memory`; not those of this pipeline.
            policy: a preset, or "auto", to plan for; None is how the components are held.
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
        """`dx/dsigma = noise - x0` at noise level `sigma` (`b`, fp32, in [0, 1]), of the shape of `latents`.

        A family names the conditions it reads as keyword-only parameters.
        """
        raise NotImplementedError

    def roles_at(self, sigma: float, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The roles that `velocity()` calls at a noise level: `loop_roles`, where it has no experts to choose from.

        Args:
            sigma: in (0, 1].
            values: arguments and what units wrote.
        """
        return self.loop_roles

    @classmethod
    def conditions(cls, *, required_only: bool = False) -> frozenset[str]:
        """The names that `velocity()` reads; of them, those without a default if `required_only`."""
        parameters = inspect.signature(cls.velocity).parameters.values()
        named = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
        return frozenset(each.name for each in named if not required_only or each.default is each.empty)

    def run_units(self, units: Sequence[Unit], values: Mapping[str, Any]) -> dict[str, Any]:
        """Run some units on the `cond` branch, with gradients if they are on; for training.

        Args:
            units: a part of `self.units`, in order; see `needed_for` and `split`.
            values: arguments and earlier results; arguments that are left out take their defaults.

        Returns:
            all values that are known afterwards.
        """
        defaults = {name: parameter.default for name, parameter in self.__signature__.parameters.items()}
        batch_size = max((len(values[name]) for name in self.per_image if name in values), default=1)
        given = {"device": self.device, "dtype": self.dtype, "batch_size": batch_size, **self._facts()}
        state = CallValues(defaults | given | dict(values))
        known = frozenset(state.shared) | frozenset(GIVEN) | frozenset(self.facts)
        run_units(check_units(units, known), self.components, state)
        return state.view("cond")

    def condition_units(self, *also: str) -> tuple[Unit, ...]:
        """The units that write what `velocity()` reads, and the further names given."""
        return needed_for(self.program.units, {*self.conditions(), *also})

    def __getattr__(self, name: str) -> Any:
        """Roles are attributes: `pipe.dit`."""
        if name in type(self).roles:
            return self.components[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}{did_you_mean(name, type(self).roles)}")

    def _planned(self, arguments: Mapping[str, Any]) -> Request:
        """The call, checked, with the plan that keeps the limit; the plan may decide to decode in tiles."""
        request = self.check(**arguments)
        if self._limit is None:
            return request
        plan = self._limit.plan(request, arguments)
        if plan.tiled:
            request = self.check(**{**arguments, "tiled": True})
        return replace(request, plan=plan)

    def _draw(self, request: Request) -> Any:
        state = self._new_state(request)
        run_units(self.program, self.components, state, around=functools.partial(self._stage, request))
        latents = self._denoise(request, state)
        if request.loop.output_type == "latents":
            return latents
        return self._output(request, state, latents)

    @classmethod
    def _whole_program(cls) -> Program:
        given = (*GIVEN, *cls.facts)
        return check_units(with_added_units(cls, given), given)

    def _new_state(self, request: Request) -> CallValues:
        loop = {name: getattr(request.loop, name) for name in LOOP_NAMES}
        seeds = self.mesh.broadcast_seeds(request.seeds)
        given = {"device": self.device, "dtype": self.dtype, "batch_size": request.batch_size, "seeds": seeds}
        given |= {"mesh": self.mesh, **self._facts()}
        branches = ("cond",) if request.loop.cfg_scale == 1 else ("cond", "uncond")
        return CallValues({**request.values, **loop, **given}, branches)

    def _facts(self) -> dict[str, Any]:
        """The facts of components that are loaded."""
        places = {name: place.split(".") for name, place in self.facts.items()}
        loaded = {name: (self.components[role], field) for name, (role, field) in places.items()}
        return {name: getattr(part.config, field) for name, (part, field) in loaded.items() if part is not None}

    @contextmanager
    def _stage(self, request: Request, step: Unit) -> Iterator[None]:
        _stop_if_cancelled(request)
        stage = "decode" if step in self.output_units else step.name
        with self._offloader.on_device(step.roles, stage, request.plan):
            yield

    def _denoise(self, request: Request, state: CallValues) -> Tensor:
        # The state stays fp32: in bf16, steps near the end of the schedule would round most of their change away.
        sigmas, latents = state.shared["sigmas"], state.shared["latents"].float()
        num_steps = len(sigmas) - 1
        names = self.conditions()
        conditions = {
            branch: {name: value for name, value in state.view(branch).items() if name in names}
            for branch in state.branches
        }

        step, view = 0, state.view("cond")
        experts = ExpertSwitcher(
            self._offloader, [self.roles_at(float(sigma), view) for sigma in sigmas[:-1]], request.plan
        )
        step_cache = self._step_cache_session(request)

        branches = Branches(
            conditions,
            merges=view.get(MERGES, False),
            batch_size=request.batch_size,
            axis=self.mesh.branches,
        )

        def predict(branch: str, latents: Tensor, levels: Tensor, given: Mapping[str, Any]) -> Tensor:
            is_last = step == num_steps - 1
            with (
                step_cache.forward_pass(branch, is_last=is_last),
                attention_at(request.loop.attention, step, num_steps),
            ):
                return self.velocity(latents, levels, **given).float()

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

    def _step_cache_session(self, request: Request) -> StepCacheSession:
        return step_cache_session(request.loop.step_cache, self.components, self.loop_roles, self.model_name)

    def _notify(self, hook: str, **facts: Any) -> None:
        # On meta nothing is drawn: it is a rehearsal.
        if self.device.type != "meta":
            _discovery.notify(hook, **facts)

    def _output(self, request: Request, state: CallValues, latents: Tensor) -> Any:
        state.keep({read.name for step in self.output_units for read in step.reads})
        state.shared["latents"] = latents.to(self.dtype)
        program = Program(self.output_units, MappingProxyType({}), frozenset())
        if not all(can_run(step, self.components) for step in self.output_units):
            raise MissingComponent(f"{type(self).__name__} cannot decode; ask for output_type='latents'")
        run_units(program, self.components, state, around=functools.partial(self._stage, request))
        output = state.shared["output"]
        return output[0] if request.single and isinstance(output, list) else output


def _own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function object of the subclass's own, so that its signature can differ from the base's."""

    @functools.wraps(function)
    def call(self: Pipeline, prompt: str | Sequence[str] = "", **arguments: Any) -> Any:
        return function(self, prompt, **arguments)

    return call


def _stop_if_cancelled(request: Request) -> None:
    if request.loop.cancel is not None and request.loop.cancel.is_set():
        raise Cancelled("the caller set `cancel`; no result")
