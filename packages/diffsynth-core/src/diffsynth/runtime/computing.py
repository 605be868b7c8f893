"""Computing of calls: by several processes together, and by compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffsynth.core.parallel import create_mesh
from diffsynth.runtime.acceleration.compiling import compile_components
from diffsynth.runtime.role import member_roles


class ComputeMethods:
    """The methods of `Pipeline` that set how its calls are computed."""

    def parallel(self: Any, *, cfg: int = 1, sequence: int | None = None) -> Any:
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
        self: Any,
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
        loaded = [role for role in self.all_loop_roles if self.parts[role] is not None]
        roles = loaded if compile_models is None else member_roles(compile_models, self.components)
        compile_components(self.parts, roles, **{"mode": mode, "dynamic": dynamic, "fullgraph": fullgraph, **options})
