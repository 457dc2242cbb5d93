"""The feature queue: order, wrapping, and what the step's logits see."""

import pytest
import torch

from mmadapt.models.aurora import FeatureQueue


def rows(start, count=2, dim=3):
    base = torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(-1, dim)
    return base.clone(), -base.clone(), torch.arange(start, start + count)


def test_rows_are_written_in_order_and_wrap():
    queue = FeatureQueue(6, 3)
    for start in (0, 2, 4, 6):
        queue.enqueue(*rows(start))
    queue.flush()
    assert queue.ids.tolist() == [6, 7, 2, 3, 4, 5]
    assert int(queue.pointer) == 2
    expected = torch.tensor([6, 7, 2, 3, 4, 5.0])[:, None].expand(-1, 3)
    assert torch.equal(queue.image, expected)
    assert torch.equal(queue.text, -expected)


def test_old_rows_stay_until_the_next_use_so_backward_sees_them():
    queue = FeatureQueue(4, 3)
    old = queue.image.clone()
    features = torch.randn(2, 3, requires_grad=True)
    loss = (features @ queue.image.T).sum()
    queue.enqueue(*rows(10))
    assert torch.equal(queue.image, old)
    loss.backward()
    torch.testing.assert_close(features.grad, old.sum(0).expand(2, -1))


def test_fresh_rows_are_unit_vectors_of_no_image():
    queue = FeatureQueue(50, 8)
    assert queue.ids.unique().tolist() == [-100]
    torch.testing.assert_close(queue.image.norm(dim=1), torch.ones(50))


def test_a_saved_queue_goes_on_where_it_was():
    queue, fresh = FeatureQueue(6, 3), FeatureQueue(6, 3)
    queue.enqueue(*rows(0))
    queue.enqueue(*rows(2))  # not flushed: saving must not lose it
    fresh.load_state_dict(queue.state_dict())
    for one in (queue, fresh):
        one.enqueue(*rows(4))
        one.enqueue(*rows(6))
        one.flush()
    assert torch.equal(queue.ids, fresh.ids)
    assert queue.ids.tolist() == [6, 7, 2, 3, 4, 5]


def test_released_queues_are_taken_over():
    queue = FeatureQueue(4, 2)
    image, text = torch.randn(2, 4), torch.randn(2, 4)
    queue.load_released(image, text)
    assert torch.equal(queue.image, image.T)
    assert queue.ids.tolist() == [-100] * 4
    with pytest.raises(ValueError, match=r"text_queue: expected \[2, 4\], got \[4, 2\]"):
        queue.load_released(image, text.T)


def test_a_batch_must_divide_the_queue():
    with pytest.raises(ValueError, match=r"queue_size: 6 is no multiple .* 4"):
        FeatureQueue(6, 3).enqueue(*rows(0, count=4))
