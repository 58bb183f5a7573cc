"""Runs the models of a folder with the operator library in the ONNX Runtime of this interpreter.

    python check.py LIBRARY FOLDER

Needs onnxruntime and numpy only. Prints one line of JSON: the release, how many models gave the right numbers, how
many broken ones were refused, and the largest error. Ends with 1 and a line per failure if any model did not do what
it should.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

TOLERANCE = 1e-6  # of the sum of the sizes of a product's terms


def open_session(library: str, model: Path) -> onnxruntime.InferenceSession:
    """A session with the operators."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def relative_error(library: str, model: Path) -> float:
    """The largest error of the model's outputs."""
    known = np.load(model.with_suffix(".npz"))
    session = open_session(library, model)
    inputs = {port.name: known[port.name] for port in session.get_inputs()}
    errors = []
    outputs = run_in_place(session, inputs) if "in-place" in model.name else session.run(None, inputs)
    for number, y in enumerate(outputs, 1):
        exact = known[f"y{number}"]
        if y.shape != exact.shape:
            raise ValueError(f"shape {y.shape}, not {exact.shape}")
        errors.append(float((np.abs(y - exact) / known[f"terms{number}"]).max()))
    return max(errors)


def run_in_place(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs, of which those called present_X are the memory of the inputs past_X."""
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for port in session.get_outputs():
        past = port.name.replace("present", "past")
        if past in values:
            binding.bind_ortvalue_output(port.name, values[past])
        else:
            binding.bind_output(port.name)
    session.run_with_iobinding(binding)
    return [value.numpy() for value in binding.get_outputs()]


def main(library: str, folder: Path) -> int:
    """Check all models; the exit code."""
    failures, right, refused, worst = [], 0, 0, 0.0
    for model in sorted(folder.glob("good-*.onnx")):
        try:
            error = relative_error(library, model)
        except Exception as reason:
            failures.append(f"{model.name}: {reason}")
            continue
        worst = max(worst, error)
        if error <= TOLERANCE:
            right += 1
        else:
            failures.append(f"{model.name}: error {error:.2g}")
    for model in sorted(folder.glob("broken-*.onnx")):
        message = model.with_suffix(".txt").read_text(encoding="utf-8")
        try:
            open_session(library, model)
            failures.append(f"{model.name}: was loaded")
        except Exception as reason:
            if message in str(reason):
                refused += 1
            else:
                failures.append(f"{model.name}: {reason}")
    print("\n".join(failures), file=sys.stderr)
    print(json.dumps([onnxruntime.__version__, np.__version__, right, refused, worst]))
    return 1 if failures or not right or not refused else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
