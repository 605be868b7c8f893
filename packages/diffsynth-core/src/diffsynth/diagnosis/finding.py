"""One line of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CheckResult = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was seen.

    Args:
        name: of the thing, short.
        state: "ok"; "note", which may matter to somebody; "broken", which stops something that should work.
        seen: in words.
        next_action: what to type or do; only "ok" may do without.
        cause: the error behind it, if there is one.

    Raises:
        ValueError: it is not "ok" and says nothing to do.
    """

    name: str
    state: CheckResult
    seen: str
    next_action: str = ""
    cause: BaseException | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.state != "ok" and not self.next_action:
            raise ValueError(f"finding {self.name!r} is {self.state!r} and has no next action")

    def to_dict(self) -> dict[str, str]:
        """Plain values."""
        return {"name": self.name, "state": self.state, "seen": self.seen, "next_action": self.next_action}
