"""The exception tree of the product; every leaf carries the exit code of the command line.

ReportedError            exporters.errors; id, message, remedy
├── ExportError      3   exporters: the model cannot be exported, the ONNX file cannot be read
├── ValidationError  3   validators: the file cannot be validated
├── UsageError       2   options or recipe
├── InputRefused     3   the model, the text or a file is unsafe, corrupt or unsupported
├── GateFailed       4   a measured gate failed
├── OutOfResources   5   memory, disk or device
├── OutputRefused    6   the output exists, is locked or cannot be written
├── HubError         7   hub or network
└── StoppedSafely   75   stopped by a signal; the same command continues
"""

from __future__ import annotations

from exporters.errors import ReportedError

__all__ = [
    "GateFailed",
    "HubError",
    "InputRefused",
    "OutOfResources",
    "OutputRefused",
    "ReportedError",
    "StoppedSafely",
    "UsageError",
]


class UsageError(ReportedError):
    """An option or a recipe field that cannot be used as given."""

    exit_code = 2


class InputRefused(ReportedError):
    """A model, text or file that is unsafe, corrupt or unsupported."""

    exit_code = 3


class GateFailed(ReportedError):
    """A measured gate failed; the output is complete and its report says which gate."""

    exit_code = 4


class OutOfResources(ReportedError):
    """Not enough memory, disk space or device memory, or the device is absent."""

    exit_code = 5


class OutputRefused(ReportedError):
    """The output exists already, is locked by another run, or cannot be written."""

    exit_code = 6


class HubError(ReportedError):
    """The model hub or the network did not deliver."""

    exit_code = 7


class StoppedSafely(ReportedError):
    """A signal stopped the run between two blocks."""

    exit_code = 75
