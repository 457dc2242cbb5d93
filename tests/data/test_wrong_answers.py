import pytest

from mmadapt.data import ScienceQA, WrongAnswers

DRAWS = 100_000


@pytest.mark.parametrize(
    ("variant", "rate", "tolerance"),
    [("uniform_all", 0.075, 0.0025), ("strictly_wrong", 0.100, 0.003)],
)
def test_rate_over_many_draws_on_four_choices(variant, rate, tolerance):
    wrong = WrongAnswers(0.1, variant, seed=3)
    drawn = [wrong.draw(2, 4, epoch=0, index=i) for i in range(DRAWS)]
    assert set(drawn) == {0, 1, 2, 3}
    changed = sum(answer != 2 for answer in drawn) / DRAWS
    assert changed == pytest.approx(rate, abs=tolerance)
    for other in (0, 1, 3):
        assert drawn.count(other) / DRAWS == pytest.approx(rate / 3, abs=tolerance)


def test_draws_depend_on_seed_epoch_and_index_only():
    def letters(seed, epoch, order=range(200)):
        wrong = WrongAnswers(0.5, "strictly_wrong", seed)
        drawn = {i: wrong.draw(0, 4, epoch=epoch, index=i) for i in order}
        return [drawn[i] for i in range(200)]

    assert letters(0, 1) == letters(0, 1, reversed(range(200)))
    assert letters(0, 1) != letters(0, 2)
    assert letters(0, 1) != letters(1, 1)


def test_rate_zero_and_one():
    assert all(WrongAnswers().draw(1, 3, epoch=e, index=e) == 1 for e in range(50))
    always = WrongAnswers(1.0, "strictly_wrong")
    assert all(always.draw(1, 2, epoch=0, index=i) == 0 for i in range(50))


def test_the_reader_redraws_per_epoch_and_keeps_the_record(problem, write_scienceqa):
    root = write_scienceqa({str(i): problem() for i in range(60)})

    def texts(data):
        return [data[i].messages[-1]["content"][0]["text"] for i in range(len(data))]

    data = ScienceQA(root, wrong_answer_rate=0.5, wrong_answers="strictly_wrong", seed=7)
    plain = texts(ScienceQA(root, seed=1))
    assert plain == texts(ScienceQA(root, seed=2)) == ["The answer is B. " + WHY] * 60
    first = texts(data)
    assert first == texts(data)
    assert 10 < sum(a != b for a, b in zip(first, plain, strict=True)) < 50
    assert all(text.endswith(WHY) for text in first)
    data.set_epoch(1)
    assert texts(data) != first
    data.set_epoch(0)
    assert texts(data) == first
    assert all(data[i].record["answer"] == 1 for i in range(60))


WHY = "BECAUSE: Things have colours. Roses are red."


def test_held_out_splits_refuse_wrong_answers(problem, write_scienceqa):
    root = write_scienceqa({"1": problem(split="test")})
    with pytest.raises(ValueError, match="evaluation uses true answers"):
        ScienceQA(root, "test", wrong_answer_rate=0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rates_outside_0_1_are_refused(rate):
    with pytest.raises(ValueError, match=r"wrong_answer_rate: expected 0\.\.1"):
        WrongAnswers(rate)


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="wrong_answers: expected one of"):
        WrongAnswers(0.1, "other")
