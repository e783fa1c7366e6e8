"""The self-test of a bundle: what it catches and where, what it needs, and that damaged files are refused before it."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmedge.bundle import MANIFEST, Manifest, file_entry, open_bundle
from vlmedge.demo import demo_folder
from vlmedge.errors import BundleError, UsageError
from vlmedge.limits import Limits
from vlmedge.parity.metrics import NOISE
from vlmedge.parity.selftest import CHECKS, SelfTest, selftest
from vlmedge.parity.selftest_checks import WITH_MODEL
from vlmedge.parity.selftest_file import SCHEMA
from vlmedge.parity.vectors import record
from vlmedge.pipeline import export
from vlmedge.prompt import Tokenizer
from vlmedge.records import encode
from vlmedge.runtimes import RUNTIMES
from vlmedge.session import Step

FORMATS = {"gguf": "llamacpp", "onnx": "onnxruntime"}
BOTH = pytest.mark.parametrize("format", FORMATS)
# A file of each format whose content, but not whose size, depends on the weights.
WEIGHTS = {"gguf": "text.gguf", "onnx": "onnx/decoder_model_merged.onnx_data"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """The demo checkpoint, as a folder of somebody's, in f32, in every format; not to be written to."""
    folder = tmp_path_factory.mktemp("selftest")
    source = shutil.copytree(demo_folder("moondream2"), folder / "moondream2")
    return {f: export(source, f, "f32", folder / f, verify=False, threads=1).path for f in FORMATS}


@pytest.fixture
def copy(bundles, tmp_path):
    """A bundle to be changed."""
    return lambda format: Path(shutil.copytree(bundles[format], tmp_path / f"copy.{format}"))


def sealed(bundle: Path, name: str, content: bytes) -> Path:
    """Replace a file and make the manifest's hashes right."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    for i, entry in enumerate(manifest["files"]):
        if entry["path"] == name:
            manifest["files"][i] = encode(file_entry(bundle, name, entry["role"]))
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


def vectors_of(bundle: Path) -> dict:
    return json.loads((bundle / "selftest.json").read_text(encoding="utf-8"))


def with_vectors(bundle: Path, vectors: object) -> Path:
    return sealed(bundle, "selftest.json", json.dumps(vectors).encode())


def first_failing(found: SelfTest) -> str | None:
    return None if found.failing is None else found.checks[found.failing].stage


# ---- what is recorded -----------------------------------------------------------------------------------------------


@BOTH
def test_a_bundle_passes(bundles, succeed, format):
    done = succeed("selftest", bundles[format], "--threads", 1)
    assert f"({format} f32, {FORMATS[format]}) passes its self-test" in done.out
    assert all(title in done.out for title in CHECKS.values())
    data = succeed("selftest", bundles[format], "--threads", 1, "--json").data
    assert [c["stage"] for c in data["checks"]] == list(CHECKS)
    assert {c["outcome"] for c in data["checks"]} == {"passed"}
    assert (data["failing"], data["runtime"], data["recorded_with"]) == (None, FORMATS[format], FORMATS[format])
    assert data["seconds"] < 60


@BOTH
def test_vectors_are_small_and_the_same_twice(bundles, tmp_path, format):
    other = export("demo:moondream2", format, "f32", tmp_path / "x", verify=False, threads=1).path
    content = (bundles[format] / "selftest.json").read_bytes()
    assert content == (other / "selftest.json").read_bytes()
    assert len(content) < 64_000


def test_the_tensor_from_the_words(bundles):
    """The second implementation makes the crops; the words say how they become the tensor."""
    from vlmedge.parity.pictures import pattern
    from vlmedge.reference.preprocess import crops

    vectors, image = vectors_of(bundles["onnx"]), open_bundle(bundles["onnx"]).manifest.model.image
    assert "a division, a subtraction and a division, each rounded to float32" in vectors["tensor"]
    for vector in vectors["pictures"]:
        _, pixels = crops(pattern(vector["height"], vector["width"]), image)
        assert list(pixels.transpose(0, 3, 1, 2).shape) == vector["tensor_shape"]
        scaled = np.empty(vector["tensor_shape"], "<f4")
        for c in range(3):
            table = np.array([np.float32(v) / np.float32(255) for v in range(256)], np.float32)
            table = (table - np.float32(image.mean[c])) / np.float32(image.std[c])
            scaled[:, c] = table[pixels[..., c]]
        assert hashlib.sha256(scaled.tobytes()).hexdigest() == vector["tensor_sha256"]


def test_choices_and_their_margins(bundles):
    model = vectors_of(bundles["gguf"])["model"]
    for reading in (model["small"], model["stitched"]):
        logits = reading["logits"]
        assert reading["tokens"][0] == logits["at"][0]
        assert reading["values"][0] == logits["values"][0]
        wanted = (logits["values"][0] - logits["values"][1]) / logits["rms"]
        assert reading["margins"][0] == pytest.approx(wanted, abs=1e-4)
        assert len(reading["tokens"]) == len(reading["values"]) == len(reading["margins"])
        assert min(reading["margins"]) >= 0
    found = model["found"]
    assert (len(found["boxes"]), len(found["points"]), len(found["bins"])) == (2, 2, 12)
    assert len(found["margins"]) == 12
    bins = open_bundle(bundles["gguf"]).manifest.model.region.coord_bins
    assert found["points"][0] == pytest.approx({"x": found["bins"][8] / bins, "y": found["bins"][9] / bins}, abs=1e-5)
    assert set(found["prompt_ids"]) == {"detect", "point"}


def with_limits(manifest: Manifest, *limits: Limits) -> Manifest:
    """A profile of the user's own: limits of an installed one are not taken from a manifest."""
    return replace(manifest, profile=replace(manifest.profile, name="own", limits=limits))


def test_limits_are_those_of_the_stored_comparison(bundles):
    bundle = open_bundle(bundles["gguf"])
    tokenizer = Tokenizer((bundle.path / "tokenizer.json").read_bytes())
    original = Limits("original", "because", 1e-1, 2e-1, 3e-1, None)
    stored = Limits("stored", "because", 1e-3, 2e-3, 3e-3, 4e-3)
    for limits, expected in (
        ((original, stored), (1e-3, 2e-3, 3e-3, 4e-3)),
        ((original,), (1e-1, 2e-1, 3e-1, None)),
        ((), (0.1, 0.1, 0.35, 0.1)),
    ):
        data = record(with_limits(bundle.manifest, *limits), tokenizer, None)
        assert tuple(data["limits"][s] for s in ("features", "projected", "logits", "regions")) == expected
    assert data["noise"] == NOISE


# ---- wrong runtimes -------------------------------------------------------------------------------------------------


class Passing:
    """A session that passes everything on."""

    def __init__(self, session):
        self.session, self.runtime = session, session.runtime

    def __getattr__(self, name):
        return getattr(self.session, name)


class Swapped(Passing):
    def vision(self, pixels):
        return self.session.vision(np.ascontiguousarray(pixels[..., ::-1]))


class Stitched(Passing):
    def project(self, features, tiling):
        return self.session.project(np.concatenate([features[:1], features[:0:-1]]), tiling)


class Causal(Passing):
    def forward(self, inputs, *, bidirectional=False, hidden=False, every=False):
        return self.session.forward(inputs, hidden=hidden, every=every)


class Lost(Passing):
    def forward(self, inputs, *, bidirectional=False, hidden=False, every=False):
        if len(inputs) == 1:
            self.session.rewind(self.session.position - 1)
        return self.session.forward(inputs, bidirectional=bidirectional, hidden=hidden, every=every)


class Halved(Passing):
    def head(self, name, inputs):
        out = self.session.head(name, inputs)
        return np.roll(out, len(out) // 2) if name == "size_decoder" else out


class Normed(Passing):
    """Region heads are right, what they are given is not."""

    def forward(self, inputs, *, bidirectional=False, hidden=False, every=False):
        step = self.session.forward(inputs, bidirectional=bidirectional, hidden=hidden, every=every)
        return step if step.hidden is None else Step(step.logits, step.hidden - step.hidden.mean())


class Overflowing(Passing):
    def vision(self, pixels):
        return self.session.vision(pixels) * np.float32(np.inf)


class Never(Passing):
    def __init__(self, session):
        raise AssertionError("nothing must be opened")


def faulty(format, kind):
    right = RUNTIMES[FORMATS[format]]

    def opened(opening):
        return kind(right.open(opening))

    return replace(right, open=opened)


@pytest.fixture
def install(monkeypatch):
    """Put a runtime into the table, under the name of the format's own."""

    def put(format, runtime):
        monkeypatch.setitem(globals(), "RUNTIME", runtime)
        monkeypatch.setitem(RUNTIMES._table, FORMATS[format], f"{__name__}:RUNTIME")

    return put


@BOTH
@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Swapped, "features"),
        (Stitched, "projected"),
        (Causal, "logits"),
        (Lost, "tokens"),
        (Halved, "regions"),
        (Normed, "boxes"),
        (Overflowing, "features"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_runtime_is_caught_at_its_stage(bundles, install, format, kind, check):
    install(format, faulty(format, kind))
    with np.errstate(all="ignore"):
        found = selftest(bundles[format], threads=1)
    assert first_failing(found) == check, found.checks
    assert found.cause
    assert found.checks[found.failing].why


def test_a_failure_is_told(bundles, install, cli):
    install("gguf", faulty("gguf", Swapped))
    done = cli("selftest", bundles["gguf"], "--threads", 1)
    assert done.code == 1
    assert "(gguf f32, llamacpp) FAILS at vision features: relative RMS" in done.out
    assert "\nusually: pixels normalised otherwise" in done.out


@BOTH
def test_another_tokenizer(copy, format):
    """With hashes made right: two ids of the vocabulary change places."""
    bundle = copy(format)
    data = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    found = selftest(sealed(bundle, "tokenizer.json", json.dumps(data).encode()), threads=1)
    assert first_failing(found) == "tokenizer"
    assert "the tokenizer of another release" in found.cause


@pytest.mark.parametrize(
    ("key", "value", "check"),
    [("crops_sha256", ["0" * 64, "0" * 64], "preprocess"), ("tensor_sha256", "0" * 64, "pixels")],
)
def test_other_pixels(copy, key, value, check):
    bundle = copy("onnx")
    vectors = vectors_of(bundle)
    vectors["pictures"][0][key] = value
    assert first_failing(selftest(with_vectors(bundle, vectors), threads=1)) == check


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("part", "choices", "check"), [("small", "tokens", "tokens"), ("found", "bins", "boxes")])
def test_near_ties(copy, part, choices, check, tied):
    """A token or a bin that falls otherwise is a fault, unless it was chosen by less than the noise."""
    bundle = copy("onnx")
    vectors = vectors_of(bundle)
    found, at = vectors["model"][part], -1  # the last: nothing follows from it
    tie = vectors["noise"] * vectors["limits"]["logits"]
    found[choices][at] += 1
    found["margins"][at] = tie * (0.9 if tied else 1.1)
    vectors["limits"]["logits"], vectors["noise"] = 10.0, tie / 10.0  # the choice alone is judged, not its number
    result = selftest(with_vectors(bundle, vectors), threads=1)
    (stage,) = (c for c in result.checks if c.stage == check)
    assert first_failing(result) == (None if tied else check), result.checks
    assert (stage.ambiguous, stage.outcome) == ((1, "passed") if tied else (0, "failed"))
    assert ("won by" in stage.why) is not tied


@pytest.mark.parametrize("token", [1, 10**6, -1])
def test_another_answer(copy, token):
    """An id that no tokenizer has is not fed."""
    bundle = copy("gguf")
    vectors = vectors_of(bundle)
    vectors["model"]["small"]["tokens"][2] = token
    assert first_failing(selftest(with_vectors(bundle, vectors), threads=1)) == "tokens"


def test_without_limits_numbers_are_measured(copy):
    bundle = copy("onnx")
    vectors = vectors_of(bundle)
    vectors["limits"] = dict.fromkeys(vectors["limits"])
    found = selftest(with_vectors(bundle, vectors), threads=1)
    assert found.passed
    assert {c.outcome for c in found.checks if c.stage in WITH_MODEL} == {"measured"}


# ---- what it needs --------------------------------------------------------------------------------------------------

BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        reference = name.startswith("vlmedge.reference.")
        if name.split(".")[0] in {blocked} or reference:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from vlmedge.cli import main
main(sys.argv[1:])
"""


@BOTH
def test_it_needs_neither_torch_nor_the_reference(bundles, format):
    """Nor, for ONNX, anything beyond the base install."""
    blocked = {"torch", "ray", "coremltools", "transformers"} | ({"llama_cpp"} if format == "onnx" else set())
    code = BARE.format(blocked=blocked)
    words = [sys.executable, "-c", code, "selftest", str(bundles[format]), "--threads", "1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failing"] is None


def test_recorded_without_a_runtime(install, tmp_path, succeed):
    """What needs no model is checked, the rest is said to be unknown."""
    missing = "llama-cpp-python is not installed: pip install it"
    install("gguf", replace(RUNTIMES["llamacpp"], missing=lambda: missing, open=Never))
    bundle = export("demo:moondream2", "gguf", "f32", tmp_path / "x", verify=False, threads=1).path
    found = selftest(bundle)
    assert found.passed
    assert found.runtime == ""
    assert [c.outcome for c in found.checks] == ["passed"] * 4 + ["skipped"] * 6
    done = succeed("selftest", bundle)
    why = "the bundle was exported where its runtime is not installed"
    assert f"note: nothing was recorded of the model: {why}" in done.out
    assert "(gguf f32) passes its self-test as far as it was recorded" in done.out


def test_where_the_runtime_is_missing(bundles, install, refused):
    missing = "llama-cpp-python is not installed: pip install it"
    install("gguf", replace(RUNTIMES["llamacpp"], missing=lambda: missing, open=Never))
    assert f"cannot be run here: {missing}" in refused("selftest", bundles["gguf"], "--quiet")


def test_a_runtime_of_another_format(bundles):
    with pytest.raises(UsageError, match="runs bundles of the format onnx"):
        selftest(bundles["gguf"], runtime="onnxruntime")


# ---- damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "line"),
    [
        ({"schema": "vlmedge.selftest/1"}, f"has the schema 'vlmedge.selftest/1', this version reads '{SCHEMA}'"),
        ([], "has the schema 'None'"),
        ({"schema": SCHEMA}, "selftest.json lacks the key 'pixels'"),
    ],
    ids=["old", "list", "empty"],
)
def test_vectors_that_cannot_be_used(copy, refused, vectors, line):
    assert line in refused("selftest", with_vectors(copy("gguf"), vectors))


def test_vectors_that_are_no_json(copy, refused):
    assert "selftest.json is damaged" in refused("selftest", sealed(copy("gguf"), "selftest.json", b"{"))


def test_a_bundle_without_vectors(copy):
    bundle = copy("gguf")
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = [f for f in manifest["files"] if f["role"] != "selftest"]
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="has no self-test vectors; export it again"):
        selftest(bundle)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """Bundles of a checkpoint that differs in one number: every file has the size of its twin."""
    folder = tmp_path_factory.mktemp("others")
    source = Path(shutil.copytree(demo_folder("moondream2"), folder / "moondream2"))
    weights = bytearray((source / "model.safetensors").read_bytes())
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    (name,) = (n for n in header if n.endswith("lm_head.weight"))
    weights[8 + size + header[name]["data_offsets"][0]] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    return {f: export(source, f, "f32", folder / f, verify=False, threads=1).path for f in FORMATS}


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@BOTH
@pytest.mark.parametrize("verb", ["selftest", "verify"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped", "vectors"])
def test_damage_is_refused_before_anything_runs(copy, others, install, refused, format, verb, damage):
    bundle, name = copy(format), WEIGHTS[format]
    install(format, faulty(format, Never))
    if damage == "swapped":
        assert (bundle / name).stat().st_size == (others[format] / name).stat().st_size
        shutil.copy(others[format] / name, bundle / name)
    elif damage == "vectors":
        name = "selftest.json"
        flipped(bundle / name)
    else:
        {"flipped": flipped, "truncated": truncated}[damage](bundle / name)
    line = refused(verb, bundle, "--threads", 1)
    assert f"{bundle / name} " in line
    expected = "bytes instead of" if damage == "truncated" else "is damaged in chunk 0 of 8 MiB; copy it again"
    assert expected in line
