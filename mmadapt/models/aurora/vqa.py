"""Visual question answering with BLIP's answer decoder: training, ranking, generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmadapt.models.aurora.cross_mask import cross_masks
from mmadapt.models.aurora.cross_states import CrossStates
from mmadapt.models.aurora.encoders import blip_of, visual_hidden

IGNORED = -100


class VQALoss(NamedTuple):
    loss: Tensor


class QuestionStates(NamedTuple):
    """Fused question states `[B, L, d]` and their mask `[B, L]`; `frames` is T."""

    hidden: Tensor
    mask: Tensor
    frames: int


def encode_questions(blip: Any, pixels: Tensor, ids: Tensor, mask: Tensor) -> QuestionStates:
    """Questions `[B, L]` (first token [ENC]) read beside images `[B, 3, H, W]` or videos."""
    visual = visual_hidden(blip, pixels)
    output = blip.text_encoder(ids, attention_mask=mask, encoder_hidden_states=visual.flatten(1, 2))
    return QuestionStates(output.last_hidden_state, mask, visual.shape[1])


def answer_losses(
    logits: Tensor, ids: Tensor, mask: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Summed token losses `[N]` of answers `[N, A]` from causal logits `[N, A, V]`; fp32.

    Token t is predicted at t - 1; padding does not count.
    """
    labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(labels.shape).sum(1)


class VQAObjective(nn.Module):
    """Weighted answer losses of `BlipForQuestionAnswering` (BLIP, Aurora).

    Each question's states are repeated for its answers; an answer's summed token loss is
    multiplied by its weight (VQAv2: share of annotators; MSRVTT-QA: 0.05), and the total is
    divided by the number of frames B*T, as the released code does.

    Args:
        model: bare or in a PEFT wrapper.
        label_smoothing: BLIP uses 0.1, the released Aurora 0.

    Raises:
        ValueError: a model of another class.
    """

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        blip = blip_of(model)
        if not hasattr(blip, "text_decoder") or not hasattr(blip, "text_encoder"):
            raise ValueError(
                f"model: expected a BlipForQuestionAnswering, got {type(blip).__name__}"
            )
        self.model, self.label_smoothing = model, label_smoothing

    @property
    def blip(self) -> Any:
        return blip_of(self.model)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        weights: Tensor,
        counts: Tensor,
    ) -> VQALoss:
        """A batch's loss.

        `input_ids`, `attention_mask` [B, L]: questions, first token [ENC]. `answer_ids`,
        `answer_mask` [N, A]: all answers one after another, first token [DEC], with [SEP];
        `weights` [N]; `counts` [B]: answers of each question, adding up to N.
        """
        states = encode_questions(self.blip, pixel_values, input_ids, attention_mask)
        repeated = states.hidden.repeat_interleave(counts, 0, output_size=len(answer_ids))
        mask = states.mask.repeat_interleave(counts, 0, output_size=len(answer_ids))
        with cross_masks(self.blip.text_decoder.bert):
            logits = self.blip.text_decoder(
                answer_ids,
                attention_mask=answer_mask,
                encoder_hidden_states=repeated,
                encoder_attention_mask=mask,
            ).logits
        losses = answer_losses(
            logits, answer_ids, answer_mask, label_smoothing=self.label_smoothing
        )
        return VQALoss((weights * losses).sum() / (len(input_ids) * states.frames))


@torch.no_grad()
def rank_answers(
    blip: Any,
    questions: QuestionStates,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    k_test: int = 128,
) -> Tensor:
    """`[B]`: index of the likeliest candidate for every question.

    Candidates `[C, A]` start with [DEC]. Those whose first token is among the likeliest after
    [DEC] are scored: the `k_test` best, and any other that ties with the last of them, since
    candidates that share a first token cannot be told apart by it. The score is the summed
    log-likelihood of all tokens; ties go to the lower index.

    Raises:
        ValueError: k_test outside 1..C.
    """
    count = len(answer_ids)
    if not 1 <= k_test <= count:
        raise ValueError(f"k_test: expected 1..{count} (the candidates), got {k_test}")
    states = CrossStates.of(blip.text_decoder, questions.hidden)
    start = answer_ids[:1, :1].expand(len(questions.hidden), 1)
    first = _decode(blip, start, None, states, questions.mask)[:, -1]
    probabilities = first.float().softmax(-1)[:, answer_ids[:, 1]]
    bound = probabilities.topk(k_test, dim=1).values[:, -1:]
    best = []
    for row, kept in enumerate(probabilities >= bound):
        chosen = kept.nonzero().squeeze(1)
        ids, mask = answer_ids[chosen], answer_mask[chosen]
        own = states.take(chosen.new_tensor([row])).expand(len(chosen))
        seen = questions.mask[row].expand(len(chosen), -1)
        losses = answer_losses(_decode(blip, ids, mask, own, seen), ids, mask)
        best.append(chosen[losses.argmin()])
    return torch.stack(best)


def _decode(blip: Any, ids: Tensor, mask: Tensor | None, states: CrossStates, seen: Tensor) -> Any:
    """Causal logits [N, A, V]; `seen` [N, L] masks the question's tokens."""
    with cross_masks(blip.text_decoder.bert):
        return blip.text_decoder(
            ids,
            attention_mask=mask,
            encoder_hidden_states=states.placeholder(),
            encoder_attention_mask=seen,
            past_key_values=states.cache(),
        ).logits


@torch.no_grad()
def generate_answers(
    blip: Any,
    questions: QuestionStates,
    *,
    dec_token_id: int,
    sep_token_id: int,
    pad_token_id: int,
    max_length: int = 10,
    min_length: int = 1,
    num_beams: int = 1,
    attend_padding: bool = True,
    use_cache: bool = True,
) -> Tensor:
    """`[B, <= max_length]`: answers from [DEC] to [SEP], greedy or by beams.

    `attend_padding`: the decoder also sees the states of the question's padding, as in the
    released code (and in `BlipForQuestionAnswering.generate`). The cache holds keys and values
    with the adapters' share; the released code's cache lacks it.
    """
    hidden, mask = questions.hidden, questions.mask
    start = torch.full((len(hidden), 1), dec_token_id, device=hidden.device)
    with cross_masks(blip.text_decoder.bert):
        return blip.text_decoder.generate(
            input_ids=start,
            encoder_hidden_states=hidden,
            encoder_attention_mask=torch.ones_like(mask) if attend_padding else mask,
            eos_token_id=sep_token_id,
            pad_token_id=pad_token_id,
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            do_sample=False,
            use_cache=use_cache,
        )
