"""What is shipped: the checkpoint under upstream's names, the pictures with their answers, and how both are scored."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import vlmedge
from vlmedge import demo, families
from vlmedge.checkpoint import open_folder
from vlmedge.demo.evaluate import evaluate, unseen
from vlmedge.demo.gallery import GALLERY, gallery_scene, write_gallery
from vlmedge.demo.questions import questions
from vlmedge.demo.scene import draw
from vlmedge.errors import UsageError


class Oracle:
    """Knows every scene by its pixels; `blur` moves what it says away from the truth."""

    def __init__(self, scenes, blur=0.0):
        self.scenes = {draw(s).tobytes(): s for s in scenes}
        self.blur = blur

    def find(self, image, text, skill):
        scene = self.scenes[image.tobytes()]
        (question, *_) = [q for q in questions(scene) if q.text == text and q.skill == skill]
        return scene, question

    def query(self, image, question, *, spatial_refs=()):
        return SimpleNamespace(text="?" if self.blur else self.find(image, question, "query")[1].answers[-1])

    def caption(self, image, length="normal"):
        return SimpleNamespace(text="?" if self.blur else self.find(image, length, "caption")[1].answers[0])

    def detect(self, image, thing):
        scene, question = self.find(image, thing, "detect")
        boxes = [scene.things[i].box for i in question.targets]
        return SimpleNamespace(
            boxes=[
                SimpleNamespace(x_min=b.x_min + self.blur, y_min=b.y_min, x_max=b.x_max + self.blur, y_max=b.y_max)
                for b in boxes
            ]
        )

    def point(self, image, thing):
        scene, question = self.find(image, thing, "point")
        centers = [scene.things[i].box.center for i in question.targets]
        return SimpleNamespace(points=[SimpleNamespace(x=x + self.blur, y=y) for x, y in centers])


def test_one_who_knows_scores_everything():
    scenes = unseen(20)
    score = evaluate(Oracle(scenes), scenes)
    assert score.exact == score.mean_iou == score.hit_rate("detect") == score.hit_rate("point") == 1.0
    assert set(score.kinds.values()) == {1.0}
    assert score.as_dict()["questions"] == sum(len(questions(s)) for s in scenes)


def test_one_who_does_not_scores_nothing():
    scenes = unseen(20)
    score = evaluate(Oracle(scenes, blur=2.0), scenes)
    assert score.exact == score.mean_iou == score.hit_rate("detect") == score.hit_rate("point") == 0.0
    nothing_there = sum(not q.targets for s in scenes for q in questions(s) if q.skill == "detect")
    assert score.right["detect"] == nothing_there


def test_only_the_kept_questions_are_asked():
    scenes = unseen(3)
    score = evaluate(Oracle(scenes), scenes, keep=lambda q: q.skill == "caption")
    assert set(score.asked) == {"caption/short", "caption/normal", "caption/long"}


def test_importing_the_demo_and_its_scoring_needs_no_torch():
    first = "import sys, vlmedge.demo; assert 'numpy' not in sys.modules"
    code = f"{first}; import vlmedge.demo.evaluate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'moondream2'"):
        demo.demo_folder("moondream")
    with pytest.raises(UsageError, match="did you mean 'shapes'"):
        demo.demo_picture("shape")


def test_the_checkpoint_is_small_and_binds():
    folder = demo.demo_folder("moondream2")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    checkpoint = open_folder(folder)
    family = families.family_of(checkpoint)
    assert family.name == "moondream2"
    spec = family.spec(checkpoint)
    bound = family.weights(spec).bind(checkpoint.tensors)
    assert {t.dtype for t in bound.values()} == {"bf16"}
    assert {name: t.shape for name, t in bound.items()} == spec.tensors()
    assert checkpoint.tensors["model.vision.patch_emb.weight"].shape == (spec.vision.width, 588)
    assert checkpoint.tensors["model.vision.pos_emb"].shape == (1, spec.vision.tokens, spec.vision.width)
    assert family.tokenizer(checkpoint) == (folder / "tokenizer.json").read_bytes()


def test_the_shipped_recipe_is_the_trainers(tmp_path):
    from vlmedge.demo.recipe import write_recipe

    write_recipe(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        shipped = json.loads((demo.demo_folder("moondream2") / name).read_text())
        assert json.loads((tmp_path / name).read_text()) == shipped


def test_the_shipped_pictures_are_the_gallery(tmp_path):
    write_gallery(tmp_path)
    assert json.loads((tmp_path / "answers.json").read_text()) == demo.demo_answers()
    for name in GALLERY:
        shipped = np.array(Image.open(demo.demo_picture(name)))
        assert np.abs(shipped.astype(int) - draw(gallery_scene(name))).mean() < 1


@pytest.mark.slow
def test_the_checkpoint_sees():
    scenes = unseen(40)
    with vlmedge.load("demo:moondream2", threads=1) as model:
        score = evaluate(model, scenes)
    assert score.exact >= 0.93
    assert score.mean_iou >= 0.75
    assert score.hit_rate("detect") >= 0.93
    assert score.hit_rate("point") >= 0.93


def test_the_shipped_pictures_are_answered():
    asked = list(demo.demo_questions())
    with vlmedge.load("demo:moondream2", threads=1) as model:
        right = sum(model.query(str(picture), question).text == answer for picture, question, answer in asked)
    assert right >= 0.9 * len(asked)
