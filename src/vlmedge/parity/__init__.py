"""Right before fast: models compared stage by stage, and the vectors that carry the result to a device."""
