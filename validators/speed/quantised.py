"""Dense rivals of a sparse model, made by ONNX Runtime's own tools from its dense float32 form."""

from __future__ import annotations

from pathlib import Path

import onnx

from exporters.read import read_model
from validators.errors import ValidationError
from validators.session import first_line, import_onnxruntime
from validators.speed.contents import contents_of

BLOCK = (
    32  # weights that share a scale; the smallest usual size, and the fastest in ONNX Runtime's CPU kernels
)
INT8_ACTIVATIONS = 4  # ``accuracy_level``: products of int8 where the processor has them


def quantise(form: str, source: Path, target: Path) -> None:
    """Write ``target``, with its weights in external data, from the dense float32 model ``source``.

    Args:
        form: "int8": ``quantize_dynamic``, a scale per output; "int4": ``MatMulNBits``, a scale per 32 weights.
            Both quantise every product with a stored weight, the head included, and leave embeddings alone.
        source: Its weights are float32 and reach the products directly.
        target: The new ``.onnx`` file.

    Raises:
        ValidationError: E-BENCH-BASELINE: the tool fails, or leaves a product as it was.
        ValidationResourceError: E-ORT-MISSING.
    """
    import_onnxruntime()
    try:
        (_quantise_int8 if form == "int8" else _quantise_int4)(source, target)
    except Exception as error:  # the tools raise whatever goes wrong inside
        if isinstance(error, MemoryError):
            raise
        raise _failed(form, source, first_line(error)) from error
    # The tools pass over what they do not know without a word: only the file tells what they did.
    before, after = contents_of(read_model(source)), contents_of(read_model(target))
    if after.float_products:
        raise _failed(
            form, source, f"{after.float_products} of {before.products} products were left as they were"
        )


def _quantise_int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=[
            "MatMul"
        ],  # the default takes embeddings, too, which then cost time at every token
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,  # beyond 2 GiB a file cannot hold its weights
    )


def _quantise_int4(source: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=4,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=INT8_ACTIVATIONS,
        op_types_to_quantize=("MatMul",),
    )
    quantiser.model.replace_gemm_with_matmul()  # it knows MatMul alone, and passes over Gemm
    quantiser.process()
    quantiser.model.save_model_to_file(str(target), use_external_data_format=True)


def _failed(form: str, source: Path, reason: str) -> ValidationError:
    return ValidationError(
        "E-BENCH-BASELINE",
        f"{source.name}: no {form} baseline could be made: {reason}",
        "give one that you made with --baseline, or leave it out with --make",
    )
