"""Dataclasses to JSON and back, and what unknown, missing and mistyped keys say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vlmedge.checkpoint import open_folder
from vlmedge.errors import CheckpointError, UsageError
from vlmedge.families import family_of
from vlmedge.records import decode, encode
from vlmedge.spec import Coordinate, Ids, Image, ImageSpec, MlpProjector, ModelSpec, PromptSpec, Text

GOLDEN = Path(__file__).parent / "data" / "moondream2" / "tiny-mha"


def test_a_model_survives_json():
    checkpoint = open_folder(GOLDEN)
    model = family_of(checkpoint).spec(checkpoint)
    data = json.loads(json.dumps(encode(model)))
    assert decode(ModelSpec, data, "model") == model
    assert data["kind"] == "ModelSpec"
    assert data["image"]["tiling"]["kind"] == "OverlapCrops"


def test_a_template_survives_json():
    prompt = PromptSpec(
        templates={"query": (Ids((1, 2)), Image(), Text("{question}"), Coordinate("x"))},
        stop=(0,),
        banned=(),
        max_tokens=5,
        top_p=0.3,
    )
    assert decode(PromptSpec, json.loads(json.dumps(encode(prompt))), "prompt") == prompt


@dataclass(frozen=True, slots=True)
class _Inner:
    size: int = 1


@dataclass(frozen=True, slots=True)
class _Other:
    text: str


@dataclass(frozen=True, slots=True)
class _Record:
    count: int
    ratio: float = 0.5
    name: str = ""
    flag: bool = False
    mode: Literal["fast", "lean"] = "fast"
    inner: _Inner = _Inner()
    either: _Inner | _Other | None = None
    pair: tuple[int, str] = (0, "")
    many: tuple[int, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    free: Any = None
    number_or_text: int | str | None = None


def test_a_record_with_everything():
    record = _Record(1, 2.0, "n", True, "lean", _Inner(3), _Other("t"), (4, "p"), (5, 6), {"k": 7.0}, [None], "x")
    assert decode(_Record, json.loads(json.dumps(encode(record))), "r") == record


def test_defaults_and_whole_numbers_for_float():
    record = decode(_Record, {"count": 1, "ratio": 2, "either": None, "table": {"a": 1}}, "r")
    assert record == _Record(1, 2.0, table={"a": 1.0})
    assert isinstance(record.ratio, float)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"count": 1, "cuont": 2}, r"r has the unknown key 'cuont'; did you mean 'count'\?"),
        ({"count": 1, 5: 2}, r"r has the unknown key 5"),
        ({}, r"r lacks the key 'count'"),
        ([], r"r must be a table, not a list"),
        (None, r"r must be a table, not nothing"),
        ({"count": "1"}, r"r\.count must be a whole number, not the text '1'"),
        ({"count": True}, r"r\.count must be a whole number, not the truth value True"),
        ({"count": 1.5}, r"r\.count must be a whole number, not the number 1\.5"),
        ({"count": None}, r"r\.count must be a whole number, not nothing"),
        ({"count": 1, "ratio": "x"}, r"r\.ratio must be a number, not the text 'x'"),
        ({"count": 1, "ratio": True}, r"r\.ratio must be a number, not the truth value True"),
        ({"count": 1, "ratio": float("nan")}, r"r\.ratio must be a finite number, not nan"),
        ({"count": 1, "ratio": float("inf")}, r"r\.ratio must be a finite number, not inf"),
        ({"count": 1, "ratio": 10**5000}, r"r\.ratio must be a number, not int an enormous number"),
        ({"count": 1, "flag": 1}, r"r\.flag must be true or false, not int 1"),
        ({"count": 1, "mode": "faste"}, r"r\.mode is 'faste'; did you mean 'fast'\?"),
        ({"count": 1, "mode": ["x"]}, r"r\.mode is \['x'\]"),
        ({"count": 1, "inner": {"sise": 1}}, r"r\.inner has the unknown key 'sise'; did you mean 'size'\?"),
        ({"count": 1, "inner": {"kind": "_Other"}}, r"r\.inner has the kind '_Other', not '_Inner'"),
        ({"count": 1, "either": {"size": 1}}, r"r\.either has the kind None"),
        ({"count": 1, "either": {"kind": "_Iner"}}, r"r\.either has the kind '_Iner'; did you mean '_Inner'\?"),
        ({"count": 1, "either": {"kind": ["_Inner"]}}, r"r\.either has the kind \['_Inner'\]"),
        ({"count": 1, "either": 5}, r"r\.either must be _Inner or _Other, not int 5"),
        ({"count": 1, "pair": [1]}, r"r\.pair must have 2 items, not 1"),
        ({"count": 1, "pair": ["a", "b"]}, r"r\.pair\[0\] must be a whole number"),
        ({"count": 1, "many": 5}, r"r\.many must be a list, not int 5"),
        ({"count": 1, "many": [1, "x"]}, r"r\.many\[1\] must be a whole number"),
        ({"count": 1, "table": []}, r"r\.table must be a table, not a list"),
        ({"count": 1, "table": {"k": "v"}}, r"r\.table\.k must be a number"),
        ({"count": 1, "number_or_text": []}, r"r\.number_or_text must be a whole number or a string, not a list"),
        ({"count": 1, "name": 10**5000}, r"r\.name must be a string, not int an enormous number"),
    ],
)
def test_what_is_wrong_is_said(data: object, words: str):
    with pytest.raises(UsageError, match=words) as error:
        decode(_Record, data, "r")
    assert "\n" not in str(error.value)


def test_long_values_are_cut_and_the_error_is_the_callers():
    with pytest.raises(CheckpointError) as error:
        decode(_Record, {"count": "x" * 10_000}, "r", CheckpointError)
    assert len(str(error.value)) < 200


def test_kinds_of_single_members_are_checked():
    projector = encode(MlpProjector(hidden=1, activation="gelu", joins_global=True))
    assert decode(MlpProjector, projector, "p").hidden == 1
    with pytest.raises(UsageError, match="p has the kind 'ImageSpec', not 'MlpProjector'"):
        decode(MlpProjector, {**projector, "kind": ImageSpec.__name__}, "p")
