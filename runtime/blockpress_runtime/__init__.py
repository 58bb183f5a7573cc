"""Runs models with packed sparse weights in ONNX Runtime.

import blockpress_runtime

session = blockpress_runtime.session("model.onnx")
"""

from blockpress_runtime.library import BlockpressRuntimeError, library_path, register, session

__all__ = ["BlockpressRuntimeError", "library_path", "register", "session"]
