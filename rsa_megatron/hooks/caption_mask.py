"""The caption mask on its way through LLaVAModel's splice, inside the loss mask.

Between the arguments of its forward and its language model LLaVAModel moves the loss mask's numbers to where the tokens come to
lie, and sets some to 0; no more. There alone they are marked: the language model and whoever takes the result get them as they
were. A caption's row is marked by the sign of its number (-0.0 is a caption's row that the LM loss skips): exact in every float
type and for every weight of 0 or more. A packed row has several samples' captions: their number is added, 64 s for sample s, in float64,
whose 53 bits hold a float32 weight below 64 beside it (to 2^-38 for a thousand samples: the rounding of a weight of 2^-14).

Shapes: B rows, S text positions, L positions of the spliced row.
"""

import torch
from torch import Tensor

_STEP = 64


def put_on(loss_mask_BS: Tensor, caption_mask_BS: Tensor, *, packed: bool) -> Tensor:
    """The loss mask with the marks.

    Args:
        caption_mask_BS: 1 where a caption's token stands, or in a packed row s of sample s = 1, 2, ..; else 0.
    """
    number_BS = loss_mask_BS if loss_mask_BS.is_floating_point() else loss_mask_BS.float()
    if packed:
        number_BS = number_BS.double() + _STEP * caption_mask_BS
    return torch.copysign(number_BS, (0.5 - caption_mask_BS).to(number_BS))


def take_off(marked_BL: Tensor, dtype: torch.dtype, *, packed: bool) -> tuple[Tensor, Tensor]:
    """The loss mask as it was, in `dtype`, and the caption mask, both spliced."""
    number_BL = marked_BL.abs()
    if not packed:
        return number_BL.to(dtype), marked_BL.signbit().to(marked_BL.dtype)
    sample_BL = (number_BL / _STEP).floor()
    return (number_BL - _STEP * sample_BL).to(dtype), sample_BL
