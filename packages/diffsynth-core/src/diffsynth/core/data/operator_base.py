"""What a data operator is: one value in, one value out, chained by `>>`."""

from __future__ import annotations

from typing import Any


class DataProcessingOperator:
    """A step between a manifest's cell and a training value. Subclasses define `__call__`."""

    def __call__(self, data: Any) -> Any:
        """The processed value."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def __rshift__(self, following: DataProcessingOperator) -> DataProcessingPipeline:
        """Both, one after the other."""
        return DataProcessingPipeline([self, following])


class DataProcessingPipeline(DataProcessingOperator):
    """Operators in order; `first >> second` builds one.

    Args:
        operators: applied from first to last; pipelines among them are flattened.

    Raises:
        TypeError: something among them cannot be called.
    """

    def __init__(self, operators: list[DataProcessingOperator] | None = None) -> None:
        self.operators: list[DataProcessingOperator] = []
        for operator in operators or []:
            if not callable(operator):
                raise TypeError(f"{operator!r} is no data operator; expected something that takes one value")
            self.operators += operator.operators if isinstance(operator, DataProcessingPipeline) else [operator]

    def __call__(self, data: Any) -> Any:
        """The value after the last operator."""
        for operator in self.operators:
            data = operator(data)
        return data
