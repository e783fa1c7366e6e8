"""What a benchmark is going to do: scenarios, models, units and labels, before anything runs."""

import shutil
from pathlib import Path

import pytest

from vlmedge.device_bench import models as models_module
from vlmedge.device_bench.models import look
from vlmedge.device_bench.plan import Options, Place, make_plan
from vlmedge.device_bench.scenario import Scenario, load_scenario, scenario_names
from vlmedge.errors import ImageError, UsageError

LAPTOP = {
    "llamacpp": {"cpu": "", "cuda": "", "metal": "no Mac"},
    "onnxruntime": {"cpu": "", "cuda": "no GPU"},
    "torch": {"cpu": "", "cuda": "no GPU"},
}
HERE = Place("local", LAPTOP)
QUICK = load_scenario("quick")


@pytest.fixture(scope="module")
def models(bundle, golden):
    return look([str(bundle)], str(golden))


def labels(plan):
    return [seat.variant.label for seat in plan.seats]


def test_every_shipped_scenario():
    assert {"quick", "standard"} <= set(scenario_names())
    for name in scenario_names():
        found = load_scenario(name)
        assert found.name == name
        assert found.work.asks == found.asks
        for ask in found.asks:
            assert Path(ask.picture).is_absolute()
            assert min(ask.width, ask.height) > 0


@pytest.fixture
def scenario(tmp_path, photo):
    """Write a scenario beside a picture and load it."""
    shutil.copy(photo, tmp_path / "mine.png")

    def write(head="", ask='name = "a"\npicture = "mine.png"\n'):
        path = tmp_path / "own.toml"
        path.write_text(f'title = "Own"\n{head or "tokens = 4"}\n[[ask]]\n{ask}')
        return load_scenario(str(path))

    return write


def test_an_own_scenario(scenario, tmp_path):
    found = scenario("tokens = 4\nrounds = 2\nmin_seconds = 1")
    assert isinstance(found, Scenario)
    (ask,) = found.asks
    assert (ask.question, ask.picture, len(ask.sha256)) == ("", str(tmp_path / "mine.png"), 64)
    assert (found.work.scenario, found.work.tokens, found.work.min_seconds, found.rounds) == ("own", 4, 1.0, 2)
    assert found.changed(rounds=5, tokens=7).work.tokens == 7
    shipped = Path(load_scenario("quick").asks[0].picture).name
    assert Path(scenario(ask=f'name = "a"\npicture = "{shipped}"\n').asks[0].picture).parent.name == "images"


@pytest.mark.parametrize(
    ("head", "ask", "told"),
    [
        ("tokens = 1", None, "tokens = 1; it must be at least 2"),
        ("token = 4", None, "unknown key 'token'; did you mean 'tokens'"),
        ("tokens = 4\nrounds = 0", None, "rounds = 0"),
        ("tokens = 4\nmin_seconds = inf", None, "min_seconds must be a finite number"),
        (None, 'name = "a"\npicture = "none.png"\n', "neither at .*none.png nor among those that ship"),
        (None, 'name = "a"\npicture = "mine.png"\n[[ask]]\nname = "a"\npicture = "mine.png"\n', "two asks named 'a'"),
        ("tokens = ", None, "is not TOML"),
    ],
)
def test_scenarios_that_are_refused(scenario, head, ask, told):
    with pytest.raises(UsageError, match=told):
        scenario(head or "tokens = 4", ask or 'name = "a"\npicture = "mine.png"\n')


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1.0])
def test_seconds_that_never_end(seconds):
    with pytest.raises(UsageError, match="has min_seconds = "):
        QUICK.changed(min_seconds=seconds)


def test_names_and_pictures_that_are_none(scenario, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'standard'"):
        load_scenario("standart")
    with pytest.raises(UsageError, match=r"nowhere.toml cannot be read: No such file"):
        load_scenario(str(tmp_path / "nowhere.toml"))
    with pytest.raises(ImageError, match="no picture that Pillow can read"):
        scenario(ask='name = "a"\npicture = "own.toml"\n')


def test_every_unit_that_is_there_and_the_original_in_two_types(models):
    plan = make_plan(models, [HERE], QUICK)
    assert labels(plan) == ["original bf16", "original f32", "golden.gguf", "golden.gguf cuda"]
    original, _, exported, _ = (seat.variant for seat in plan.seats)
    assert (original.runtime, original.dtype, original.format, original.bits_per_weight) == (
        "torch",
        "bf16",
        "checkpoint",
        None,
    )
    assert (exported.runtime, exported.dtype, exported.format, exported.profile) == ("llamacpp", "", "gguf", "f32")
    assert exported.bits_per_weight >= 32
    assert plan.reference.variant.label == "original f32"
    assert plan.reference.variant == plan.seats[1].variant
    told = [(a.seat.variant.runtime, a.seat.variant.unit, a.reason, a.asked) for a in plan.absent]
    assert told == [("torch", "cuda", "no GPU", False), ("llamacpp", "metal", "no Mac", False)]


def test_units_that_are_asked_for(models):
    plan = make_plan(models, [HERE], QUICK, Options(units=("cuda", "metal"), threads=3))
    assert labels(plan) == ["golden.gguf cuda"]
    assert {seat.variant.threads for seat in plan.seats} == {3}
    assert plan.reference is not None  # the truth is asked of the CPU all the same
    told = {(a.seat.variant.label, a.reason) for a in plan.absent if a.asked}
    assert told == {
        ("original bf16 cuda", "no GPU"),
        ("original f32 cuda", "no GPU"),
        ("original bf16 metal", "the runtime 'torch' has no unit 'metal'; it has cpu, cuda"),
        ("original f32 metal", "the runtime 'torch' has no unit 'metal'; it has cpu, cuda"),
        ("golden.gguf metal", "no Mac"),
    }
    with pytest.raises(UsageError, match="no runtime has the unit 'cudda'; did you mean 'cuda'"):
        make_plan(models, [HERE], QUICK, Options(units=("cudda",)))


def test_runtimes_that_are_asked_for(models):
    assert len(make_plan(models, [HERE], QUICK, Options("llamacpp")).seats) == 4
    with pytest.raises(UsageError, match="the runtime 'onnxruntime' runs onnx bundles; none is named"):
        make_plan(models, [HERE], QUICK, Options("onnxruntime"))
    with pytest.raises(UsageError, match="unknown runtime 'lamacpp'; did you mean 'llamacpp'"):
        make_plan(models, [HERE], QUICK, Options("lamacpp"))


def test_devices_that_run_only_some(models):
    phone = Place("phone", {"llamacpp": {"cpu": "", "vulkan": ""}, "onnxruntime": {"cpu": ""}}, 4)
    plan = make_plan(models, [phone], QUICK, here=HERE)
    assert labels(plan) == ["golden.gguf", "golden.gguf vulkan"]
    assert {seat.variant.threads for seat in plan.seats} == {4}
    assert plan.reference.device == "local"
    assert plan.devices == ("phone",)
    assert [(a.seat.variant.label, a.reason, a.asked) for a in plan.absent] == [
        (label, "phone has nothing that runs checkpoints (PyTorch); it has llamacpp, onnxruntime", True)
        for label in ("original bf16", "original f32")
    ]
    bare = make_plan(models, [Place("bare", {"llamacpp": {"cpu": "not installed", "cuda": "nor this"}})], QUICK)
    assert (bare.seats, bare.reference) == ((), None)
    assert [a.reason for a in bare.absent if a.asked and not a.seat.variant.is_original] == ["not installed"]
    none = make_plan(models, [Place("none", {"llamacpp": {}, "torch": {}})], QUICK)  # every model is told of
    assert (none.seats, [a.asked for a in none.absent]) == ((), [True] * 3)


def test_models_are_named_once(bundle, bundle_copy, golden, tmp_path):
    with pytest.raises(UsageError, match="is the same model as another one that is named"):
        look([str(bundle), str(bundle_copy)], None)
    with pytest.raises(UsageError, match="is a bundle; the original is a checkpoint"):
        look([], str(bundle))
    with pytest.raises(UsageError, match="at least one bundle or checkpoint"):
        look([], None)
    (model,) = look([str(golden)], None)  # a checkpoint as a source: the original's runtime, in its own type only
    plan = make_plan([model], [HERE], QUICK)
    assert (labels(plan), plan.reference) == (["tiny-mha bf16"], None)


def test_a_name_means_what_it_means_everywhere(golden, tmp_path, monkeypatch):
    """A folder of the name of a release is not taken for it; a link is called what the user calls it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").symlink_to(golden)
    (tmp_path / "moondream2").symlink_to(golden)
    (model,) = look(["mine"], None)
    assert (model.subject.source, model.subject.label) == (str(tmp_path / "mine"), "mine")
    monkeypatch.setattr(models_module, "examine", lambda source, *_, **__: pytest.fail(source))
    with pytest.raises(pytest.fail.Exception, match=r"^moondream2$"):
        look(["moondream2"], None)


def test_the_same_plan_wherever_its_files_lie(bundle, bundle_copy):
    def digest(path, scenario=QUICK, **options):
        return make_plan(look([str(path)], None), [HERE], scenario, Options(**options)).digest

    alias = bundle_copy.with_name(bundle.name)
    bundle_copy.rename(alias)
    first = digest(bundle)
    assert digest(alias) == first
    assert digest(bundle, QUICK.changed(rounds=9)) == first  # more of the same
    assert digest(bundle, QUICK.changed(tokens=9)) != first
    assert digest(bundle, threads=2) != first
