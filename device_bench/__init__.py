"""The benchmark: what a model costs on a device, beside the original, with its agreement in the same row."""
