"""The loop above every runtime, on a session that only counts."""

import numpy as np
import pytest

from tests.fakes import VOCAB, WIDTH, FakeSession
from vlmedge.answer import Box, Point
from vlmedge.errors import ContextError, UsageError
from vlmedge.generate import Conversation, Embedded, Prefix, Sampler, generate
from vlmedge.regions import RegionDecoder
from vlmedge.session import Step
from vlmedge.spec import RegionSpec

PICTURE = Embedded("picture", np.ones((6, WIDTH), np.float32))
PREFIX = Prefix(((0,), PICTURE))


def forwards(session):
    return [call[1:] for call in session.calls if call[0] == "forward"]


def run(script, *, stop=(9,), banned=(), most=10, context=64, **options):
    session = FakeSession(script, context)
    talk = Conversation(session, bidirectional_prefix=True)
    first = talk.ask([(1, 2)])
    out = generate(talk, first, stop=stop, banned=banned, max_tokens=most, sampler=Sampler(), **options)
    return out, session


def test_stop_token_is_kept_and_not_fed():
    out, session = run([5, 6, 9])
    assert (out.ids, out.finish) == ((5, 6, 9), "stop")
    assert forwards(session) == [((1, 2), False), ((5,), False), ((6,), False)]


def test_length_ends_it():
    out, _ = run([5] * 20, most=4)
    assert (out.ids, out.finish) == ((5,) * 4, "length")


def test_the_contexts_end_ends_it():
    out, session = run([5] * 20, context=5)
    assert (len(out.ids), out.finish, session.position) == (4, "length", 5)


def test_bans_hold_from_the_second_token_on():
    out, _ = run([7, 7, 9], banned=(7,))
    assert out.ids[0] == 7
    assert 7 not in out.ids[1:]


def test_what_is_fed_back_can_be_replaced():
    out, session = run([5, 6, 9], feed=lambda token, step: Embedded("e", np.zeros((1, WIDTH), np.float32)))
    assert out.ids == (5, 6, 9)
    assert forwards(session)[1:] == [((1, WIDTH), False)] * 2


def test_a_cut_thought_is_in_the_cache_whole():
    out, session = run([5] * 9, most=3, feed=lambda token, step: (token,))
    assert (out.ids, session.position) == ((5, 5, 5), 5)


def test_on_token_sees_everything_but_the_end():
    seen = []
    run([5, 6, 9], on_token=seen.append)
    assert seen == [5, 6]


class TestPrefix:
    def test_bos_and_picture_are_one_bidirectional_block(self):
        session = FakeSession()
        Conversation(session, True).begin(PREFIX)
        assert forwards(session) == [((7, WIDTH), True)]

    def test_causal_without_a_picture(self):
        session = FakeSession()
        Conversation(session, True).begin(Prefix(((0, 1),)))
        assert forwards(session) == [((2, WIDTH), False)]

    def test_encoded_once_for_several_questions(self):
        session = FakeSession([1] * 9)
        talk = Conversation(session, True)
        for _ in range(3):
            talk.begin(PREFIX)
            talk.ask([(3, 4)])
        assert [bidirectional for _, bidirectional in forwards(session)] == [True, False, False, False]
        assert ("rewind", 7) in session.calls

    def test_another_picture_starts_over(self):
        session = FakeSession()
        talk = Conversation(session, True)
        talk.begin(PREFIX)
        talk.begin(Prefix(((0,), Embedded("other", PICTURE.rows))))
        assert [bidirectional for _, bidirectional in forwards(session)] == [True, True]
        assert session.position == 7

    def test_no_prefix_at_all(self):
        session = FakeSession()
        talk = Conversation(session, True)
        talk.begin(PREFIX)
        assert talk.begin(Prefix(())) is None
        assert session.position == 0


def test_context_error_gives_the_numbers():
    with pytest.raises(ContextError, match=r"the prompt takes 64 positions .* the model's context is 64"):
        Conversation(FakeSession(), True).check(64, "the prompt")


def test_context_error_names_the_option_where_it_made_the_context_short():
    with pytest.raises(ContextError, match=r"set to 64 of the model's 2048; give a larger --context, or shorten"):
        Conversation(FakeSession(), True, 2048).check(64, "the prompt")


class TestSampler:
    LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def test_greedy_takes_the_first_of_equals(self):
        assert Sampler().choose(np.zeros(5, np.float32)) == 0

    def test_a_seed_repeats(self):
        draws = [[s.choose(self.LOGITS) for _ in range(50)] for s in (Sampler(1.0, 1.0, 7), Sampler(1.0, 1.0, 7))]
        assert draws[0] == draws[1]
        assert len(set(draws[0])) > 2

    @pytest.mark.parametrize(("top_p", "kept"), [(0.3, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2})])
    def test_top_p_keeps_tokens_whose_predecessors_hold_at_most_p(self, top_p, kept):
        sampler = Sampler(1.0, top_p, 0)
        assert {sampler.choose(self.LOGITS) for _ in range(300)} == kept

    def test_bans_survive_sampling(self):
        logits = self.LOGITS.copy()
        logits[0] = -np.inf
        assert 0 not in {Sampler(1.0, 1.0, 0).choose(logits) for _ in range(100)}

    @pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 1e-310, 9e-4, -1.0])
    def test_temperatures_that_cannot_be_meant(self, temperature):
        with pytest.raises(UsageError, match=r"temperature must be 0 .* or at least 0\.001, not"):
            Sampler(temperature)

    def test_a_seed_below_zero(self):
        with pytest.raises(UsageError, match="seed must be 0 or more, not -1"):
            Sampler(1.0, seed=-1)

    def test_the_coldest_temperature_works(self):
        assert {Sampler(1e-3, 1.0, 0).choose(self.LOGITS * 1000) for _ in range(9)} == {0}

    def test_frequencies(self):
        sampler = Sampler(1.0, 1.0, 3)
        share = np.bincount([sampler.choose(self.LOGITS) for _ in range(4000)], minlength=4) / 4000
        assert share == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


SPEC = RegionSpec(4, 8, 4, 5, 8, "gelu_tanh", "log2")


def regions(script, **options):
    session = FakeSession(script)
    talk = Conversation(session, True)
    first = talk.ask([(1, 2)], hidden=True)
    return list(RegionDecoder(SPEC, talk).objects(first, stop=(0,), **options)), session


def test_points_until_the_stop_token():
    """x comes from the prompt's own hidden state; two positions per point."""
    found, session = regions([5, 1, 5, 1, 0], sizes=False, most=50)
    assert found == [(5, Point(2 / 8, 3 / 8)), (5, Point(4 / 8, 5 / 8)), (0, None)]
    assert session.position == 2 + 2 * 2


def test_boxes_have_sizes_on_a_log_scale():
    found, session = regions([5, 1, 1, 0], sizes=True, most=50)
    (token, box), (end, nothing) = found
    assert (token, end, nothing) == (5, 0, None)
    width, height = 1.0, 2.0**-10
    assert box == Box(2 / 8 - width / 2, 3 / 8 - height / 2, 2 / 8 + width / 2, 3 / 8 + height / 2)
    (fed,) = [call[2] for call in session.calls if call[:2] == ("head", "size_encoder")]
    assert fed == pytest.approx((1.0, 0.001))


def test_linear_sizes():
    decoder = RegionDecoder(RegionSpec(4, 8, 4, 5, 8, "gelu_tanh", "linear"), Conversation(FakeSession(), True))
    assert decoder.size(Step(np.zeros(VOCAB, np.float32), np.zeros(WIDTH, np.float32))) == (4 / 5, 0.0)


def test_most_objects():
    found, _ = regions([5, 1] * 9, sizes=False, most=2)
    assert len(found) == 2


def test_regions_stop_at_the_contexts_end():
    session = FakeSession([5] * 40, context=9)
    talk = Conversation(session, True)
    found = list(RegionDecoder(SPEC, talk).objects(talk.ask([(1, 2)], hidden=True), stop=(0,), sizes=True, most=50))
    assert len(found) == 2
    assert session.position <= 9
