"""The result of one check of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CheckResult = Literal["ok", "note", "broken"]
"""Result of a check: fine; possibly relevant to the user; something that should work does not."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Args:
        name: short name of the checked item.
        state: the result.
        seen: what was observed, in words.
        next_action: command to run or step to take; required unless `state` is "ok".
        cause: exception that the result is based on, if any.

    Raises:
        ValueError: `state` is not "ok" and `next_action` is empty.
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
        """Return the finding as a dict of strings: name, state, seen and next_action, without `cause`."""
        return {"name": self.name, "state": self.state, "seen": self.seen, "next_action": self.next_action}
