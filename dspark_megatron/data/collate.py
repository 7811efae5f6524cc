"""Samples of a micro-batch side by side."""

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.data.conversation import Sample


def collate(samples: list[Sample], pad_token_id: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids [b, s] int64 and loss_mask [b, s] bool, s the longest of these samples.

    Padded on the right only, with loss_mask false: no anchor can see the padding, so no attention
    mask is needed.
    """
    input_ids = pad_sequence(
        [sample.input_ids for sample in samples], batch_first=True, padding_value=pad_token_id
    )
    loss_mask = pad_sequence(
        [sample.loss_mask for sample in samples], batch_first=True, padding_value=False
    )
    return input_ids, loss_mask
