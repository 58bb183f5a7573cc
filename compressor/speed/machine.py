"""The machine that speeds were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil

from compressor.reporting import installed_versions
from validators.speed.bandwidth import largest_cache_bytes
from validators.speed.workload import usable_cores

# Instructions that decide which kernels of ONNX Runtime and of the operator library run.
_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_vbmi2",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)


def machine_facts() -> dict[str, Any]:
    """Processor, cores, cache, memory and versions."""
    facts = _processor()
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "features": [
            name for name in _FEATURES if name in facts.get("flags", facts.get("Features", "")).split()
        ],
        "largest_cache_bytes": largest_cache_bytes(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "load_average": _load_average(),
        "versions": installed_versions(),
    }


def _processor() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _load_average() -> float:
    """Processes that wanted a core over the last minute; far above what was measured, the machine was not quiet."""
    return round(psutil.getloadavg()[0], 2)
