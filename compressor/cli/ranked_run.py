"""``compress run`` as one of several processes that a launcher has started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compressor.run.launch import Launch

if TYPE_CHECKING:
    from compressor.delivery import CompressionResult
    from compressor.progress import Progress
    from compressor.recipe import Recipe


def run_ranked(
    launch: Launch,
    model: str,
    out: str,
    recipe: Recipe,
    *,
    device: str,
    resume: str,
    stop: Callable[[], bool],
    progress: Progress,
    force: bool,
    validate: bool,
    provider: str,
    parity: str,
    require: tuple[str, ...],
    **shared: Any,
) -> CompressionResult | None:
    """This process's part of the run; the result on rank 0, None on the others. Arguments as ``compress`` has them.

    Raises:
        ReportedError: An error of this process, or of another one.
    """
    from compressor.following import follow
    from compressor.pipeline import compress
    from compressor.process_group import open_ranks

    ranks, own_device = open_ranks(launch, device)
    shared |= {"device": own_device, "resume": resume, "stop": stop}
    if not ranks.is_root:
        follow(model, out, recipe, ranks, **shared)
        return None
    return compress(
        model,
        out,
        recipe,
        force=force,
        validate=validate,
        provider=provider,
        parity=parity,
        require=require,
        progress=progress,
        ranks=ranks,
        **shared,
    )
