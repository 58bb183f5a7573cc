"""Torch in, ONNX files out: block-wise graphs, encodings, manifests. Knows nothing of pruning."""
