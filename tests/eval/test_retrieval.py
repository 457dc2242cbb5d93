"""Recall and median rank on score matrices made by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmadapt.eval.retrieval import UNSCORED, ranks, recalls, retrieval_metrics


def test_positions_and_the_tie_rule():
    scores = torch.tensor(
        [
            [3.0, 2.0, 1.0],  # right one first
            [1.0, 2.0, 3.0],  # right one last
            [2.0, 2.0, 1.0],  # a tie: the wrong one stands before
            [5.0, 5.0, 5.0],
        ]
    )
    relevant = torch.zeros(4, 3, dtype=torch.bool)
    relevant[:, 0] = True
    assert ranks(scores, relevant).tolist() == [0, 2, 1, 2]


def test_the_best_of_several_captions_counts_and_they_do_not_compete():
    scores = torch.tensor([[1.0, 4.0, 4.0, 3.0, 5.0, 0.0]])
    relevant = torch.tensor([[True, True, True, True, False, True]])
    assert ranks(scores, relevant).tolist() == [1]


def test_five_captions_an_image():
    text_image = torch.arange(2).repeat_interleave(5)
    i2t = torch.full((2, 10), UNSCORED)
    i2t[0, 3] = 2.0  # found among the captions of image 0
    i2t[1, :5] = torch.arange(5.0)  # five wrong texts, its own are unscored
    t2i = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    found = retrieval_metrics(i2t, t2i, text_image)
    assert found.image_to_text == {"R@1": 50.0, "R@5": 50.0, "R@10": 100.0, "MdR": 3.5}
    assert found.text_to_image == {"R@1": 50.0, "R@5": 100.0, "R@10": 100.0, "MdR": 1.5}
    names = found.released()
    assert names["txt_r1"] == 50.0 and names["img_r_mean"] == pytest.approx(250 / 3)
    assert names["r_mean"] == pytest.approx((200 / 3 + 250 / 3) / 2)
    assert "vid_mdR" not in names
    assert found.released(video=True)["vid_mdR"] == 1.5


def test_a_gallery_as_large_as_k_leaves_nothing_unscored():
    scores = torch.eye(4)
    found = retrieval_metrics(scores, scores, torch.arange(4))
    assert found.image_to_text["R@1"] == found.text_to_image["R@1"] == 100.0
    assert found.image_to_text["MdR"] == 1.0


@pytest.mark.parametrize(
    "positions, median", [([0], 1.0), ([0, 3], 2.5), ([5, 0, 1], 2.0), ([0, 0, 9, 9], 5.5)]
)
def test_median_rank(positions, median):
    assert recalls(torch.tensor(positions))["MdR"] == median


def test_bad_matrices_are_named():
    with pytest.raises(ValueError, match=r"t2i: expected \[3, 2\]"):
        retrieval_metrics(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="row 1 has no relevant candidate"):
        retrieval_metrics(torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="hold a NaN"):
        ranks(torch.tensor([[math.nan, 1]]), torch.tensor([[True, False]]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8), st.data())
def test_against_sorting(scores, data):
    """The position in a sort that puts wrong ones before right ones of the same score."""
    right = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    right[data.draw(st.integers(0, len(scores) - 1))] = True
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    expected = min(order.index(i) for i in range(len(scores)) if right[i])
    found = ranks(torch.tensor([scores]).float(), torch.tensor([right]))
    assert int(found) == expected
