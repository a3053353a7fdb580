"""The two ways in which this package speaks up about its input."""

from __future__ import annotations

import warnings


class ContrastInputError(ValueError):
    """An input that cannot be used: which argument, what was found, what to do.

    Args:
        found: What was found, as the predicate of a sentence: ``"has shape (255, 128)"``.
        fix: What to do next, as an imperative: ``"pass the same number of rows"``.

    Example:
        >>> str(ContrastInputError("sinkhorn", "epsilon", "is 0", "pass > 0"))
        "sinkhorn: argument 'epsilon' is 0: pass > 0"
    """

    def __init__(self, function: str, argument: str, found: str, fix: str) -> None:
        self.function, self.argument, self.found, self.fix = function, argument, found, fix
        super().__init__(f"{function}: argument '{argument}' {found}: {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the parts when the error crosses a process boundary."""
        return type(self), (self.function, self.argument, self.found, self.fix)


class ContrastWarning(UserWarning):
    """An input that can be used but is probably not what was meant."""


def warn(function: str, argument: str, found: str, fix: str) -> None:
    """Warn in the words of `ContrastInputError`.

    Python's default filter shows equal text from one place once per process, so a training loop
    is warned once; keep changing numbers out of ``found``.
    """
    warnings.warn(
        f"{function}: argument '{argument}' {found}: {fix}", ContrastWarning, stacklevel=2
    )
