"""A trained state as a checkpoint folder under upstream's tensor names: `python -m vlmedge.demo.export STATE OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vlmedge import families
from vlmedge.demo.recipe import write_recipe
from vlmedge.reference.model import Reference, canonical


def write_checkpoint(model: Reference, folder: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors (bf16) as moondream2's 2025-06-21 release has them."""
    family = families.family_of(write_recipe(folder))
    tensors = family.weights(model.spec).inverse(canonical(model))
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(_stored(name, a))).bfloat16() for name, a in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def read_state(path: Path) -> Reference:
    """The model inside a trainer's state file."""
    checkpoint = write_recipe(path.parent / "recipe")
    model = Reference(families.family_of(checkpoint).spec(checkpoint))
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


def _stored(name: str, array: np.ndarray) -> np.ndarray:
    """Upstream's shapes where they differ from the canonical ones."""
    if name.endswith("patch_emb.weight"):
        return array.reshape(len(array), -1)
    return array[None] if name.endswith("pos_emb") else array


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="state.pt of a training folder")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    write_checkpoint(read_state(given.state), given.out)


if __name__ == "__main__":
    main()
