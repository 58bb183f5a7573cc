"""lm-eval-harness, where it is installed: the ONNX perplexity measured once more, by code that is not ours.

lm-eval 0.4.13 and later have a backend ``onnxruntime`` that opens an ONNX file in a session of its own. It is
given the token ids of our windows, one request per window whose context is the window's first token, so that
both sides score the same tokens after the same tokens. Its ``loglikelihood_rolling`` is not used: it cuts the
text elsewhere, and in 0.4.13 this backend leaves out the first token of each full window of its own.
"""

from __future__ import annotations

import importlib
import math
from importlib import metadata, util
from pathlib import Path
from typing import Any

from validators.checks import Check, at_most, skipped
from validators.errors import ValidationResourceError
from validators.events import OnProgress, ValidationProgress
from validators.reference import Ids
from validators.session import first_line, is_out_of_memory

CHECK_NAME = "lm-eval-perplexity"

# Both sides run the same file on the same provider and differ in how they add logarithms up: 2e-7 on the
# example model. A window shifted by one token makes 3e-3.
MAX_DIFFERENCE = 1e-3

_BACKEND = "lm_eval.models.onnxruntime_ort"
_INSTALL = "pip install 'blockpress[eval]'"


def is_installed() -> bool:
    """Whether lm-eval is installed; it is not imported."""
    return util.find_spec("lm_eval") is not None


def check_installed() -> None:
    """Do nothing where lm-eval is installed.

    Raises:
        ValidationResourceError: E-LM-EVAL-MISSING.
    """
    if not is_installed():
        raise ValidationResourceError(
            "E-LM-EVAL-MISSING",
            "tasks need lm-eval-harness, which is not installed",
            f"install it as an extra: {_INSTALL}",
        )


def harness_version() -> str:
    """The version of lm-eval, or "?" where it is not installed as a distribution."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return "?"


def agreement_check(
    model_path: Path, windows: Ids | None, measured: float | None, provider: str, on_progress: OnProgress
) -> Check:
    """|lm-eval / ours - 1| against its limit; skipped with the reason where lm-eval cannot measure.

    Args:
        model_path: The ``.onnx`` file.
        windows: (N, T) int64; None: there was no text.
        measured: Our perplexity on them.
        provider: The full name of the execution provider that our figure was measured on.
        on_progress: Told of each window.
    """
    if windows is None or measured is None:
        return skipped(CHECK_NAME, "no evaluation windows were given")
    if not is_installed():
        return skipped(CHECK_NAME, f"lm-eval-harness is not installed ({_INSTALL})")
    try:
        theirs = harness_perplexity(model_path, windows, provider, on_progress)
    except Exception as error:  # a backend of others: whatever ends it, nothing was compared
        if is_out_of_memory(error):
            raise
        return skipped(
            CHECK_NAME, f"lm-eval {harness_version()} cannot measure this file: {first_line(error)}"
        )
    why = f"{theirs:.8g} by lm-eval {harness_version()}, {measured:.8g} here, on the same {len(windows)} windows"
    difference = abs(theirs / measured - 1) if math.isfinite(theirs) else math.nan
    return at_most(CHECK_NAME, difference, MAX_DIFFERENCE, "relative", why)


def harness_perplexity(model_path: Path, windows: Ids, provider: str, on_progress: OnProgress) -> float:
    """Perplexity of the file over windows (N, T), by lm-eval's own session, inputs and log-softmax."""
    from validators.perplexity import perplexity  # it imports torch, which no other use of this module needs

    backend = _open_backend(model_path, provider, windows.shape[1])
    total = 0.0
    for done, ids in enumerate(windows.tolist(), start=1):
        # A request is (cache key, context, continuation): T - 1 tokens are scored, as in our protocol.
        ((log_likelihood, _),) = backend._loglikelihood_tokens([(None, ids[:1], ids[1:])], disable_tqdm=True)
        total -= log_likelihood
        on_progress(ValidationProgress("lm-eval", done, len(windows)))
    return perplexity(total, windows.shape[0] * (windows.shape[1] - 1))


def _open_backend(model_path: Path, provider: str, window_tokens: int) -> Any:
    """lm-eval's backend ``onnxruntime`` on the file; token ids go in, so it needs no tokenizer beside it."""
    backend_class: Any = importlib.import_module(_BACKEND).ONNXRuntimeLM

    def load_no_tokenizer(self: Any) -> None:
        self.tokenizer = None

    on_ids = type("TokenIdBackend", (backend_class,), {"_load_tokenizer": load_no_tokenizer})
    # TF32 is off in our session too: the two should differ in code and not in arithmetic.
    options = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
    return on_ids(
        pretrained=str(model_path),
        execution_provider=provider,
        provider_options=options,
        max_length=window_tokens,
    )
