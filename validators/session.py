"""ONNX Runtime sessions: which provider runs and what loading costs.

The only importer of onnxruntime but for ``speed.quantised``, which needs its tools and no session.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from numpy.typing import NDArray

from validators.errors import ValidationError, ValidationResourceError, ValidationUsageError

Array = NDArray[Any]

_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_BFLOAT16 = "tensor(bfloat16)"
_NO_DEVICE = "its device or libraries are not there"
_OUT_OF_MEMORY = (
    "bad allocation",
    "bad_alloc",
    "failed to allocate memory",
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
)


@dataclass(frozen=True)
class Port:
    """An input or output of the graph: name, ONNX Runtime's name of its type, axes (int or symbol)."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class Session:
    """A loaded ONNX file.

    Attributes:
        path: The file.
        provider: The execution provider that runs it (nodes that it lacks run on the CPU).
        inputs, outputs: The graph's ports by name, in order.
        library: Whether the operators of blockpress-runtime are registered.
        load_s: Seconds that loading took.
        load_rss_bytes: Resident memory that loading added to this process.
        notices: What the user should know about the installation.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "auto",
        extra_outputs: Sequence[str] = (),
        graph: bytes | None = None,
        *,
        library: bool = False,
        threads: int | None = None,
    ) -> None:
        """Load ``path``.

        Args:
            path: The ``.onnx`` file; its external data lies beside it.
            provider: "auto", or the name of an execution provider, with or without "ExecutionProvider".
            extra_outputs: Values inside the graph that become outputs too.
            graph: A serialized part of the file, without external data, that is loaded in its place.
            library: Register the operators of blockpress-runtime, which must be there.
            threads: Threads within an operator; None: ONNX Runtime's own choice.

        Raises:
            ValidationError: E-ORT-LOAD: ONNX Runtime refuses the file.
            ValidationUsageError: E-PROVIDER-UNKNOWN: there is no provider of that name.
            ValidationResourceError: E-PROVIDER-UNAVAILABLE, E-ORT-MISSING, or E-VALIDATE-MEMORY.
        """
        self.library = library
        ort = import_onnxruntime()
        wanted = choose_provider(provider)
        model: str | bytes = str(path) if graph is None else graph
        options = _session_options(ort)
        if library:
            _runtime().register(options)
        if threads is not None:
            options.intra_op_num_threads = threads
        folder = path.absolute().parent if extra_outputs else Path.cwd()
        if extra_outputs:
            model = path.read_bytes() + _outputs_fragment(extra_outputs)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder)
            )
        gc.collect()
        rss_before, started = psutil.Process().memory_info().rss, time.perf_counter()
        try:
            with _current_folder(folder):
                self._session = ort.InferenceSession(model, options, providers=_provider_list(wanted))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise _load_error(path, error) from error
        self.load_s = time.perf_counter() - started
        self.load_rss_bytes = max(0, psutil.Process().memory_info().rss - rss_before)
        self.path = path
        self.provider = str(self._session.get_providers()[0])
        if self.provider != wanted and provider != "auto":
            raise _unavailable(wanted, f"ONNX Runtime fell back to {self.provider}")
        self.notices = installation_notices()
        try:
            self.inputs = {port.name: _port(port) for port in self._session.get_inputs()}
            self.outputs = {port.name: _port(port) for port in self._session.get_outputs()}
        except UnicodeDecodeError as error:  # ONNX Runtime loads names of any bytes
            raise _load_error(path, error) from error
        self._ort = ort

    def value(self, array: Array, port: Port) -> Any:
        """The array as a value of ONNX Runtime, in the port's type."""
        if port.type == _BFLOAT16:
            bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, _NUMPY_TYPES[port.type]))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's ``metadata_props``."""
        found: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def bind(self, output: str, shared: Mapping[str, tuple[str, Any]]) -> BoundSession:
        """The graph with one output, and with inputs whose memory other outputs are written into.

        Args:
            output: Its name.
            shared: By name of the input, the name of the output and the value that is both.
        """
        return BoundSession(self.path, self._session, output, shared)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """The named outputs, as values of ONNX Runtime that can be fed again.

        Raises:
            ValidationError: E-ORT-RUN: the graph does not run.
            ValidationResourceError: E-VALIDATE-MEMORY.
        """
        try:
            values = self._session.run_with_ort_values(list(outputs), dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise _run_error(self.path, error) from error
        return dict(zip(outputs, values, strict=True))


class BoundSession:
    """A session of which some inputs and outputs share their memory from run to run."""

    def __init__(self, path: Path, session: Any, output: str, shared: Mapping[str, tuple[str, Any]]) -> None:
        self._path, self._session, self._output = path, session, output
        self._shared = shared  # the binding alone does not keep their memory
        self._binding = session.io_binding()
        self._binding.bind_output(output)
        for name, (written, value) in shared.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(written, value)

    def run(self, feeds: Mapping[str, Any]) -> Any:
        """The output, as a value of ONNX Runtime; ``feeds`` are the other inputs.

        Raises:
            ValidationError, ValidationResourceError: As ``Session.run``.
        """
        try:
            for name, value in feeds.items():
                self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_output(self._output)
            self._session.run_with_iobinding(self._binding)
            # The one output without a wrapper for each of the others, which take 0.2 ms in a model of 18 blocks.
            return self._binding.get_outputs_as_ortvaluevector()[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise _run_error(self._path, error) from error


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ValidationResourceError: E-ORT-MISSING.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValidationResourceError(
            "E-ORT-MISSING",
            f"ONNX Runtime is not installed ({error})",
            "install it as an extra: pip install 'blockpress[gpu]' (x86) or 'blockpress[cpu]'",
        ) from error
    return onnxruntime


def packed_runtime() -> str | None:
    """Why packed weights cannot be multiplied as they lie here; None where blockpress-runtime works."""
    try:
        _runtime().register(_session_options(import_onnxruntime()))
    except ImportError:
        return "blockpress-runtime is not installed"
    except Exception as error:  # its own error, or one of ONNX Runtime's: the library does not load
        return first_line(error)
    return None


def _runtime() -> Any:
    """The module of blockpress-runtime; optional, so that it is not imported before it is asked for.

    Raises:
        ImportError: It is not installed.
    """
    return importlib.import_module("blockpress_runtime")


def installation_notices() -> tuple[str, ...]:
    """What is odd about the installation of ONNX Runtime; empty when nothing is."""
    present = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(present) < 2:
        return ()
    return (
        f"E-ORT-BOTH: {' and '.join(present)} are both installed and overwrite each other's files; the one "
        "installed last runs, and a CPU one silently loses CUDA: uninstall both, then install one",
    )


def check_provider(provider: str) -> None:
    """Do nothing where ONNX Runtime is here and has the provider, as far as can be told without running it.

    Raises:
        ValidationUsageError: E-PROVIDER-UNKNOWN.
        ValidationResourceError: E-PROVIDER-UNAVAILABLE, E-ORT-MISSING.
    """
    ort = import_onnxruntime()
    if provider.lower() != "auto":
        name = _named_provider(ort, provider)
        if name == "CUDAExecutionProvider" and not _has_cuda_driver():
            raise _unavailable(name, _NO_DEVICE)


def choose_provider(provider: str) -> str:
    """The full name of the execution provider that a request means; "auto" is CUDA where it works, else CPU.

    Raises:
        ValidationUsageError: E-PROVIDER-UNKNOWN.
        ValidationResourceError: E-PROVIDER-UNAVAILABLE: this installation or machine lacks it; E-ORT-MISSING.
    """
    ort = import_onnxruntime()
    if provider.lower() == "auto":
        cuda = "CUDAExecutionProvider"
        works = cuda in ort.get_available_providers() and _works(ort, cuda)
        return cuda if works else "CPUExecutionProvider"
    name = _named_provider(ort, provider)
    if name != "CPUExecutionProvider" and not _works(ort, name):
        raise _unavailable(name, _NO_DEVICE)
    return name


def _named_provider(ort: Any, provider: str) -> str:
    """The full name of a provider that this installation has."""
    available = ort.get_available_providers()
    by_short_name: dict[str, str] = {_short(name): name for name in ort.get_all_providers()}
    name = by_short_name.get(_short(provider))
    if name is None:
        raise ValidationUsageError(
            "E-PROVIDER-UNKNOWN",
            f"there is no execution provider {provider!r}",
            f"available here: auto, {', '.join(available)}",
        )
    if name not in available:
        raise _unavailable(name, f"this installation of ONNX Runtime {ort.__version__} was built without it")
    return name


def to_float32(value: Any) -> NDArray[np.float32]:
    """A value of ONNX Runtime as float32."""
    if value.data_type() != _BFLOAT16:
        return np.asarray(value.numpy(), dtype=np.float32)
    # numpy has no bfloat16, so that OrtValue.numpy() refuses it; its bits are the upper half of a float32.
    shape = tuple(int(side) for side in value.shape())
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    bits = np.ctypeslib.as_array(pointer, shape=shape)
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32))


def _session_options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is reported by its exception
    # Spinning threads take whole cores from whatever else runs on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _provider_list(name: str) -> list[Any]:
    if name == "CPUExecutionProvider":
        return [name]
    # TF32 keeps 11 bits of each factor: parity would measure the card's rounding and not the file.
    options = {"use_tf32": "0"} if name == "CUDAExecutionProvider" else {}
    return [(name, options), "CPUExecutionProvider"]


@contextmanager
def _current_folder(folder: Path) -> Iterator[None]:
    """Work in ``folder`` for a while: ONNX Runtime 1.20 looks there for the data of a model given as bytes."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _outputs_fragment(names: Sequence[str]) -> bytes:
    """Bytes that add graph outputs when appended to a model: protobuf merges concatenated messages.

    ONNX Runtime infers the types. The model itself is not parsed here, which would expand its sparse indices.
    """
    fragment = onnx.ModelProto()
    for name in names:
        fragment.graph.output.add().name = name
    return bytes(fragment.SerializeToString())


def _works(ort: Any, provider: str) -> bool:
    """Whether a session of one node really runs on the provider."""
    if provider == "CUDAExecutionProvider":
        if not _has_cuda_driver():
            return False  # a session would find out too, with a page of errors on stderr
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    port = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "probe", [port], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    try:
        session = ort.InferenceSession(model.SerializeToString(), _session_options(ort), [provider])
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception:  # whatever it raises: it does not work
        return False
    return bool(session.get_providers()[0] == provider)


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _short(provider: str) -> str:
    return provider.lower().removesuffix("executionprovider")


def _port(argument: Any) -> Port:
    return Port(argument.name, argument.type, tuple(argument.shape))


def _unavailable(provider: str, why: str) -> ValidationResourceError:
    return ValidationResourceError(
        "E-PROVIDER-UNAVAILABLE",
        f"{provider} cannot run here: {why}",
        "choose another --provider, or install what it needs (CUDA: pip install 'blockpress[gpu]')",
    )


def _load_error(path: Path, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return out_of_memory(f"while ONNX Runtime loaded {path.name}")
    return ValidationError(
        "E-ORT-LOAD",
        f"{path.name}: ONNX Runtime cannot load it: {first_line(error)}",
        "export the model again; if it needs operators of another provider, choose it with --provider",
    )


def _run_error(path: Path, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return out_of_memory(f"while ONNX Runtime ran {path.name}")
    return ValidationError(
        "E-ORT-RUN",
        f"{path.name}: ONNX Runtime cannot run it: {first_line(error)}",
        "export the model again; if another tool made it, look at the named node",
    )


def out_of_memory(when: str) -> ValidationResourceError:
    """The error for memory that ran out."""
    return ValidationResourceError(
        "E-VALIDATE-MEMORY",
        f"memory ran out {when}",
        "free memory, validate on a larger machine, or judge the file alone with --structure-only",
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of ONNX Runtime, torch or Python itself means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY)


def first_line(error: Exception, length: int = 300) -> str:
    """The first line of what an error says, shortened."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= length else line[: length - 1] + "…"
