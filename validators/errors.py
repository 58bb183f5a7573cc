"""What validation refuses to judge, as opposed to what it judges and fails."""

from __future__ import annotations

from exporters.errors import ReportedError


class ValidationError(ReportedError):
    """A file that is broken, altered, unreadable or beyond what validation understands."""

    exit_code = 3


class ValidationUsageError(ValidationError):
    """A request that cannot be carried out as it was asked."""

    exit_code = 2


class ValidationResourceError(ValidationError):
    """Not enough memory or time, or the execution provider is not there."""

    exit_code = 5


class ValidationFailure(ValidationError):
    """The validation itself broke: our bug."""

    exit_code = 1


def refusal(error_id: str, message: str, remedy: str, exit_code: int) -> ReportedError:
    """An error with this exit code, of the class that has it where there is one.

    Used to raise again, in another process, an error of which only these four things crossed the border.
    """
    for kind in (ValidationError, ValidationUsageError, ValidationResourceError, ValidationFailure):
        if kind.exit_code == exit_code:
            return kind(error_id, message, remedy)
    error = ValidationError(error_id, message, remedy)
    error.exit_code = exit_code
    return error
