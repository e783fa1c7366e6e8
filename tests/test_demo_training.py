"""The trainer: its packed sequences are what the skills ask, it resumes to the bit, processes share their work."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmedge import families
from vlmedge.checkpoint import open_folder
from vlmedge.demo.attention import TrainingAttention
from vlmedge.demo.batch import NONE, TOKEN, batch, step_batch
from vlmedge.demo.evaluate import spatial_refs
from vlmedge.demo.export import read_state, write_checkpoint
from vlmedge.demo.network import block_mask, image_tokens, inputs
from vlmedge.demo.scene import draw, scene
from vlmedge.demo.train import Plan, Trainer, check, train
from vlmedge.imaging import crop
from vlmedge.prompt import PictureSpan, Tokenizer, TokenRun, render
from vlmedge.reference.session import TorchSession

PLAN = Plan(steps=4, pictures=2, length=160, warmup=1, check_pictures=2, save_seconds=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other crawl beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), PLAN)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_a_stopped_training_goes_on_to_the_same_weights(trained, tmp_path):
    first = Trainer(tmp_path, PLAN)
    for _ in range(2):
        first.learn()
    first.save()
    second = Trainer(tmp_path, PLAN)
    assert second.step == 2
    while second.progress < 1:
        second.learn()
    assert second.step == trained.step == 4
    assert same(second, trained)


def test_training_lowers_the_loss_and_check_counts(tmp_path):
    trainer = Trainer(tmp_path, Plan(steps=12, pictures=2, length=160, warmup=1, check_pictures=1))
    first = float(trainer.learn().language.detach())
    while trainer.progress < 1:
        last = float(trainer.learn().language.detach())
    assert last < 0.7 * first
    assert check(trainer).startswith("held out: exact 0.")


@pytest.mark.slow
def test_two_processes_make_one_model(tmp_path):
    ended = train(tmp_path, PLAN, workers=2)
    assert ended.step == PLAN.steps
    assert all(torch.isfinite(p).all() for p in ended.model.parameters())


def test_batches_are_a_function_of_seed_and_step(trained):
    made = [step_batch(trained.spec, trained.words, 3, step, 2, 160) for step in (5, 5, 6)]
    assert np.array_equal(made[0].ids, made[1].ids)
    assert np.array_equal(made[0].crops, made[1].crops)
    assert made[0].ids.shape != made[2].ids.shape or not np.array_equal(made[0].ids, made[2].ids)
    assert made[0].ids.shape[1] <= 160


def test_attention_equals_torchs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 9, 9) > 0.4
    mask |= torch.eye(9, dtype=torch.bool)
    for seen in (mask, None):
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        with TrainingAttention():
            got = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        weights = torch.randn_like(wanted)
        assert torch.allclose(got, wanted, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, (q, k, v), weights) for x in (got, wanted)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_packed_questions_are_what_a_session_computes(trained, tmp_path):
    """Image tokens, prompts and logits of the block-masked batch equal one question at a time in a session."""
    trained.save()
    write_checkpoint(read_state(trained.folder), trained.folder / "recipe", tmp_path)
    checkpoint = open_folder(tmp_path)
    family = families.family_of(checkpoint)
    spec = family.spec(checkpoint)
    session = TorchSession(spec, family.weights(spec).bind(checkpoint.tensors))
    model = session._model.float()
    scenes = [scene(5, 0, "tiled"), scene(5, 1, "single")]
    packed = batch(spec, trained.words, scenes, 512)
    with torch.no_grad(), TrainingAttention():
        image = image_tokens(model, packed)
        x = inputs(model, packed, image)
        hidden = model.decoder(x, mask=block_mask(packed), positions=torch.from_numpy(packed.positions))
        logits = model.decoder.logits(hidden).numpy()
    words = Tokenizer((tmp_path / "tokenizer.json").read_bytes())
    for i, content in enumerate(scenes):
        crops = crop(draw(content), spec.image)
        rows = session.project(session.vision(crops.pixels), crops.tiling)
        assert np.allclose(rows, image[i].numpy(), atol=1e-4)
        for number, question in enumerate(packed.questions[i], 1):
            at = np.nonzero(packed.branch[i] == number)[0]
            session.rewind(0)
            session.forward(np.concatenate([session.embed(np.zeros(1, np.int32)), rows]), bidirectional=True)
            step = session.forward(x[i, at].numpy(), every=True)
            assert np.allclose(step.logits, logits[i, at], atol=1e-3)
            _same_prompt(spec, words, content, question, packed, i, at)


def _same_prompt(spec, words, content, question, packed, i, at):
    name = f"caption/{question.text}" if question.skill == "caption" else question.skill
    segments = render(
        spec.prompt,
        name,
        words,
        question=question.text,
        thing=question.text,
        references=spatial_refs(content, question),
    )
    assert isinstance(segments[1], PictureSpan)
    ids = [n for s in segments[2:] for n in (s.ids if isinstance(s, TokenRun) else [NONE])]
    mine = [packed.ids[i, p] if packed.modes[i, p] == TOKEN else NONE for p in at[: len(ids)]]
    assert mine == ids
