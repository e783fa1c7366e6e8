"""How well a model answers: picture-question sets, asked of bundles and the original, scored and compared."""
