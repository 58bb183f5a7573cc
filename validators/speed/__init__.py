"""How fast an ONNX language model runs here and what it takes: ONNX files in, figures out; no verdict."""
