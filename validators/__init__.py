"""ONNX files in, verdict out: structure, parity, perplexity. Knows nothing of pruning."""
