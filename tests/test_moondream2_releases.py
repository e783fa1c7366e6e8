"""How moondream2 recognises its releases by content, refuses what cannot be meant, and finds its tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmedge.checkpoint import Checkpoint, Source, open_folder
from vlmedge.errors import CheckpointError, HubError, UnsupportedError
from vlmedge.families import FAMILIES, family_of, known_models
from vlmedge.families.moondream2 import STARMIE_REPO
from vlmedge.families.moondream2_config import read_config
from vlmedge.families.moondream2_releases import RELEASES, release
from vlmedge.spec import Text
from vlmedge.tensors import ArrayTensor

GOLDEN = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"
FAMILY = FAMILIES["moondream2"]
CONFIG: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())


def _release(checkpoint: Checkpoint) -> str:
    return release(checkpoint, read_config(checkpoint.config))


def _checkpoint(config: dict[str, Any], folder: Path = GOLDEN, revision: str = "", dtype: str = "bf16") -> Checkpoint:
    weight = ArrayTensor(np.zeros((2, 2), np.float32), dtype)
    return Checkpoint(Source("mine", revision=revision), folder, config, {"w": weight})


def _config(**tables: Mapping[str, object]) -> dict[str, Any]:
    config = deepcopy(CONFIG)
    for name, values in tables.items():
        config["config"].setdefault(name, {}).update(values)
    return config


EMPTY = {"model_type": "moondream1", "architectures": ["HfMoondream"], "config": {}}


@pytest.mark.parametrize(
    ("revision", "wanted"),
    [
        ("2025-06-21", "2025-06-21"),
        ("2025-04-14", "2025-04-14"),
        ("2025-03-27", "2025-04-14"),
        ("2025-01-09", "2025-01-09"),
        (known_models()["moondream2"].revision, "2025-06-21"),
    ],
)
def test_the_release_by_its_revision(revision: str, wanted: str):
    assert _release(_checkpoint(EMPTY, revision=revision)) == wanted


@pytest.mark.parametrize(
    ("code", "wanted"),
    [('answer_id: int = 3\n"long"', "2025-06-21"), ('"long": [1]', "2025-04-14"), ('"short": [1]', "2025-01-09")],
)
def test_the_release_by_the_code_beside_it(tmp_path: Path, code: str, wanted: str):
    (tmp_path / "config.py").write_text(code)
    assert _release(_checkpoint(EMPTY, tmp_path, dtype="f16")) == wanted


def test_the_release_by_the_ids_of_the_config():
    assert _release(_checkpoint(CONFIG)) == "2025-06-21"
    old = _config(tokenizer={"bos_id": 50256, "eos_id": 50256})
    assert _release(_checkpoint(old)) == "2025-04-14"
    del old["config"]["tokenizer"]["templates"]["caption"]["long"]
    assert _release(_checkpoint(old)) == "2025-01-09"


def test_the_release_by_its_dtype(tmp_path: Path):
    assert _release(_checkpoint(EMPTY, tmp_path, dtype="bf16")) == "2025-06-21"
    with pytest.raises(UnsupportedError, match="name the revision"):
        _release(_checkpoint(EMPTY, tmp_path, dtype="f16"))


@pytest.mark.parametrize("name", RELEASES)
def test_an_empty_config_is_the_2b_model(name: str):
    model = FAMILY.spec(_checkpoint(EMPTY, revision=name))
    assert (model.decoder.layers, model.decoder.width, model.vision.width) == (24, 2048, 1152)
    assert ("caption/long" in model.prompt.templates) == (name != "2025-01-09")
    assert ("query/reasoning" in model.prompt.templates) == (name == "2025-06-21")
    assert model.region is not None
    assert model.region.size_scale == ("linear" if name == "2025-01-09" else "log2")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "moondream1", "text_config": {}, "architectures": ["Moondream"]},
        {"model_type": "moondream1", "phi_config": {}},
        {"architectures": ["Moondream"]},
    ],
)
def test_the_2024_generation_is_refused_by_name(config: dict[str, Any]):
    with pytest.raises(UnsupportedError, match=r"2024 release.*use vikhyatk/moondream2@2025-06-21") as error:
        family_of(_checkpoint(config))
    assert "\n" not in str(error.value)


def test_other_models_are_nobodys():
    with pytest.raises(
        UnsupportedError, match=r"mine is a 'llava' checkpoint; this version knows the families .*moondream2"
    ):
        family_of(_checkpoint({"model_type": "llava"}))
    assert family_of(_checkpoint(CONFIG)).name == "moondream2"


@pytest.mark.parametrize("table", ["text", "region"])
def test_the_int4_release_is_refused(table: str):
    with pytest.raises(UnsupportedError, match="int4 release"):
        FAMILY.spec(_checkpoint(_config(**{table: {"group_size": 128}})))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"text": {"n_layer": 3}}, "config.text has the unknown key 'n_layer'; did you mean 'n_layers'?"),
        ({"visoin": {}}, "config has the unknown key 'visoin'; did you mean 'vision'?"),
        ({"text": {"dim": "128"}}, "config.text.dim must be a whole number, not the text '128'"),
        ({"text": {"dim": 1 << 40}}, f"config.text.dim is {1 << 40}, outside 1..{1 << 20}"),
        ({"text": {"vocab_size": -1}}, "config.text.vocab_size is -1, outside"),
        ({"text": {"n_layers": 1 << 19}}, "outside 1..1024"),
        ({"vision": {"enc_n_layers": 5000}}, "outside 1..1024"),
        ({"text": {"n_heads": 3}}, "3 heads of 64 do not make dim 128"),
        ({"text": {"n_kv_heads": 0}}, "config.text.n_kv_heads is 0, outside"),
        ({"vision": {"enc_n_heads": 5}}, "enc_n_heads 5 does not divide enc_dim 48"),
        ({"vision": {"crop_size": 377}}, "crop_size must be a multiple of enc_patch_size"),
        ({"vision": {"overlap_margin": 20}}, "larger than both overlap margins"),
        ({"region": {"dim": 64}}, "region.dim and text.dim must be equal"),
        ({"region": {"size_out_dim": 2047}}, "must be even"),
    ],
)
def test_configs_that_cannot_be_meant(tables: dict[str, dict[str, object]], words: str):
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        FAMILY.spec(_checkpoint(_config(**tables)))
    assert "\n" not in str(error.value)


STALE = json.dumps({"added_tokens": [{"id": 50256, "content": "<|endoftext|>"}]})


def test_the_right_tokenizer_is_taken_as_it_is():
    assert FAMILY.tokenizer(open_folder(GOLDEN)) == (GOLDEN / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("own", [STALE, None, "no JSON", "[]"], ids=["stale", "absent", "damaged", "a list"])
def test_a_stale_tokenizer_is_replaced(tmp_path: Path, own: str | None):
    if own is not None:
        (tmp_path / "tokenizer.json").write_text(own)
    asked: list[str] = []

    def fetch(repo: str, revision: str, name: str) -> Path:
        asked.append(repo)
        return GOLDEN / name

    checkpoint = _checkpoint(EMPTY, tmp_path, "2025-06-21")
    checkpoint.fetcher = fetch
    assert FAMILY.tokenizer(checkpoint) == (GOLDEN / "tokenizer.json").read_bytes()
    assert asked == [STARMIE_REPO]


def test_a_stale_tokenizer_without_a_way_to_replace_it(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(STALE)
    checkpoint = _checkpoint(EMPTY, tmp_path, "2025-06-21")
    with pytest.raises(CheckpointError, match=r"stale GPT-2 one.*tokenizer\.json of moondream/starmie-v1"):
        FAMILY.tokenizer(checkpoint)

    def offline(repo: str, revision: str, name: str) -> Path:
        raise HubError("no network")

    checkpoint.fetcher = offline
    with pytest.raises(CheckpointError, match=r"could not be had \(no network\); put that file into the folder"):
        FAMILY.tokenizer(checkpoint)
    (tmp_path / "fetched.json").write_text(STALE)
    checkpoint.fetcher = lambda repo, revision, name: tmp_path / "fetched.json"
    with pytest.raises(CheckpointError, match="did not give the starmie tokenizer"):
        FAMILY.tokenizer(checkpoint)


def test_older_releases_keep_their_own(tmp_path: Path):
    checkpoint = _checkpoint(EMPTY, tmp_path, "2025-04-14")
    (tmp_path / "tokenizer.json").write_text(STALE)
    assert FAMILY.tokenizer(checkpoint) == STALE.encode()


@pytest.mark.parametrize(
    ("revision", "source"),
    [("2025-01-09", "2024-08-26"), ("2025-03-27", "2025-01-09"), ("2025-04-14", "2025-01-09")],
)
def test_older_releases_fetch_what_upstream_fetched(tmp_path: Path, revision: str, source: str):
    (tmp_path / "fetched.json").write_text(STALE)
    asked: list[tuple[str, str, str]] = []

    def fetch(repo: str, at: str, name: str) -> Path:
        asked.append((repo, at, name))
        return tmp_path / "fetched.json"

    checkpoint = _checkpoint(EMPTY, tmp_path, revision)
    with pytest.raises(CheckpointError, match=rf"no tokenizer\.json.*revision {source}.*put that file into the folder"):
        FAMILY.tokenizer(checkpoint)
    checkpoint.fetcher = fetch
    assert FAMILY.tokenizer(checkpoint) == STALE.encode()
    assert asked == [("vikhyatk/moondream2", source, "tokenizer.json")]


def test_an_older_release_refuses_the_newest_tokenizer(tmp_path: Path):
    checkpoint = _checkpoint(EMPTY, tmp_path, "2025-04-14")
    starmie = (GOLDEN / "tokenizer.json").read_text(encoding="utf-8")
    words = r"is starmie of 2025-06-21; put the tokenizer.json of vikhyatk/moondream2@2025-01-09 into the folder$"
    checkpoint.fetcher = lambda repo, revision, name: GOLDEN / name
    with pytest.raises(CheckpointError, match=words):
        FAMILY.tokenizer(checkpoint)
    (tmp_path / "tokenizer.json").write_text(starmie, encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        FAMILY.tokenizer(checkpoint)


# Shaped like upstream's config_md2.json and config_md05.json, with the ids of both.
IDS = {
    "bos_id": 50256,
    "eos_id": 50256,
    "templates": {
        "caption": {"short": [198, 198, 16438, 8305, 25], "normal": [198, 198, 24334, 1159, 25]},
        "query": {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]},
        "detect": {"prefix": [198, 198, 47504, 25], "suffix": [628]},
        "point": {"prefix": [198, 198, 12727, 25], "suffix": [628]},
    },
}
BIG: dict[str, Any] = {**EMPTY, "config": {"tokenizer": IDS}}
SMALL: dict[str, Any] = {
    **EMPTY,
    "config": {
        "text": {"dim": 1024, "ff_dim": 4096, "n_layers": 24, "n_heads": 16, "prefix_attn": 730},
        "vision": {
            "enc_dim": 720, "enc_n_layers": 27, "enc_ff_dim": 2690, "enc_n_heads": 10,
            "proj_out_dim": 1024, "proj_inner_dim": 8192,
        },
        "region": {"dim": 1024, "inner_dim": 8192},
        "tokenizer": IDS,
    },
}  # fmt: skip


@pytest.mark.parametrize(("config", "total"), [(BIG, 1_927_237_104), (SMALL, 631_889_382)], ids=["md2", "md05"])
def test_upstreams_own_configs_have_the_known_sizes(tmp_path: Path, config: dict[str, Any], total: int):
    """The small one's fact sheet says 682,270,182: with 32 key heads for 16 heads, which no code can run."""
    model = FAMILY.spec(_checkpoint(config, tmp_path))
    assert sum(math.prod(shape) for shape in model.tensors().values()) == total
    width = model.decoder.width
    assert model.tensors()["decoder.embed.weight"] == (51200, width)
    assert model.tensors()["decoder.layers.0.attn.k.weight"] == (width, width)
    assert model.tensors()["projector.up.weight"] == (8192, 2 * model.vision.width)
    assert model.tensors()["region.size_decoder.up.weight"] == (8192, width)


def test_the_code_beside_upstreams_own_configs_decides(tmp_path: Path):
    """Their ids fit two releases: the first, and the newest code with its logarithmic sizes."""
    region = FAMILY.spec(_checkpoint(SMALL, tmp_path)).region
    assert region is not None
    assert region.size_scale == "linear"
    (tmp_path / "config.py").write_text("answer_id: int = 3")
    model = FAMILY.spec(_checkpoint(SMALL, tmp_path))
    assert model.region is not None
    assert model.region.size_scale == "log2"
    assert Text(" {object}") in model.prompt.templates["detect"]
    assert model.prompt.stop == (50256,)
    assert _release(_checkpoint(SMALL, tmp_path, "2025-04-14")) == "2025-04-14"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"tokenizer": {"templates": {"query": {"prefix": [1]}}}},
            "config.tokenizer.templates.query lacks the key 'suffix'",
        ),
        ({"tokenizer": []}, "config.tokenizer must be a table"),
        ({"tokenizer": {"templates": 3}}, "config.tokenizer.templates must be"),
        ({"tokenizer": {"bos_id": -1}}, "names the token -1"),
        ({"tokenizer": {"templates": {"caption": {"short": [10**9]}}}}, "names the token 1000000000"),
        ({"text": {"max_context": 10}}, "max_context is 10, a picture alone takes 730"),
        ({"vision": {"max_crops": 1048576}}, "outside 1..1024"),
        ({"vision": {"in_channels": 4}}, "pictures have 3"),
    ],
)
def test_more_configs_that_cannot_be_meant(config: dict[str, Any], words: str):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        FAMILY.spec(_checkpoint({**EMPTY, "config": config}))


def test_architectures_that_are_no_list_belong_to_nobody():
    assert not FAMILY.matches(_checkpoint({"architectures": 5}))


def test_the_release_by_the_commit_behind_a_branch():
    checkpoint = _checkpoint(EMPTY, revision="main", dtype="f16")
    checkpoint.source = Source("mine", revision="main", commit=known_models()["moondream2"].revision)
    assert _release(checkpoint) == "2025-06-21"
