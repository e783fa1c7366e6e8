"""The blocks in PyTorch: "the original". Oracle for parity, baseline of the benchmark, source of Core ML tracing."""
