"""A training as a checkpoint folder under upstream's tensor names: `python -m vlmedge.demo.export TRAINING OUT`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vlmedge import families
from vlmedge.demo.recipe import open_recipe
from vlmedge.reference.model import Reference, canonical


def write_checkpoint(model: Reference, recipe: Path, folder: Path) -> None:
    """Write what the 2025-06-21 release has: `recipe`'s config.json and tokenizer.json, model.safetensors in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(recipe / name, folder / name)
    tensors = families.family_of(open_recipe(recipe)).weights(model.spec).inverse(canonical(model))
    path = folder / "model.safetensors"
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(_stored(name, a))).bfloat16() for name, a in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    path.chmod(0o644)  # safetensors makes it private


def read_state(folder: Path) -> Reference:
    """The model of a training folder, as its last save has it."""
    checkpoint = open_recipe(folder / "recipe")
    model = Reference(families.family_of(checkpoint).spec(checkpoint))
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["model"])
    return model


def _stored(name: str, array: np.ndarray) -> np.ndarray:
    """Upstream's shapes where they differ from the canonical ones."""
    if name.endswith("patch_emb.weight"):
        return array.reshape(len(array), -1)
    return array[None] if name.endswith("pos_emb") else array


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path, help="the trainer's folder")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    write_checkpoint(read_state(given.training), given.training / "recipe", given.out)


if __name__ == "__main__":
    main()
