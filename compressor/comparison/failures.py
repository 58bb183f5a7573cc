"""What went wrong in a cell, in a form that is kept: the error's id, message, remedy and exit code."""

from __future__ import annotations

import logging

from pydantic import BaseModel, ConfigDict

from compressor.errors import ReportedError

_LOG = logging.getLogger("compressor")
_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "std::bad_alloc")


class CellFailure(BaseModel):
    """An error as it is told: id, one line of what was expected and what came, one of what to do, exit code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    error_id: str
    message: str
    remedy: str
    exit_code: int

    def raised(self) -> ReportedError:
        """The failure as an exception, with its exit code."""
        error = ReportedError(self.error_id, self.message, self.remedy)
        error.exit_code = self.exit_code
        return error


def failure_of(error: Exception) -> CellFailure:
    """The failure for any exception; one that nobody foresaw is logged with its traceback."""
    if isinstance(error, ReportedError):
        return CellFailure(
            error_id=error.error_id, message=error.message, remedy=error.remedy, exit_code=error.exit_code
        )
    if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in _MEMORY_PHRASES):
        return out_of_memory(" ".join(str(error).split())[:300] or "the allocation was refused")
    _LOG.error("unforeseen error in a cell", exc_info=error)
    return CellFailure(
        error_id="E-COMPARE-BROKEN",
        message=f"the cell itself failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        remedy="this is a bug: please report it with the log",
        exit_code=1,
    )


def out_of_memory(detail: str) -> CellFailure:
    """The failure of a cell that the machine's or the device's memory did not hold."""
    return CellFailure(
        error_id="E-OUT-OF-MEMORY",
        message=f"not enough memory: {detail}",
        remedy="lower --num-calibration-samples or --seqlen, set recovery.batch_size, or use a larger machine",
        exit_code=5,
    )
