"""The shape of every error that a user sees: a stable id, one line that says what, one that says what to do."""

from __future__ import annotations


class ReportedError(Exception):
    """An error with a stable id, a message naming the file, tensor or field, and a remedy.

    Args:
        error_id: Stable identifier such as ``E-ONNX-TRUNCATED``; listed in ``docs/errors.md``.
        message: What was expected and what came, on one line.
        remedy: What the user can do, on one line.
    """

    exit_code = 1

    def __init__(self, error_id: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.error_id = error_id
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.error_id}: {self.message}"

    def __reduce__(self) -> tuple[type[ReportedError], tuple[str, str, str]]:
        return type(self), (self.error_id, self.message, self.remedy)


class ExportError(ReportedError):
    """A model that cannot be exported, or an ONNX file that cannot be read."""

    exit_code = 3
