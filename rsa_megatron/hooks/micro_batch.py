"""What is known of one micro-batch while it goes through one model chunk.

A new one begins with each forward pass. Selection, capture and transport each fill in their fields, and read those that stand above.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsa_megatron.batch import RSASamples
from rsa_megatron.hooks.sample_selection import Selection


@dataclass
class MicroBatch:
    """Layers are named as --rsa-layers names them."""

    #: the batch's selection on the ranks that have read it, else None; without it the forward pass is not one of training
    read_selection: Callable[[], RSASamples | Selection | None] | None = None
    #: whether RSA follows this forward pass (it leaves text generation alone)
    is_followed: bool = False

    # selection, on stages after the first the payload
    #: how many samples are packed into the one row; 0 where each row is one sample
    num_packed: int = 0

    # selection (on the first and the last stage)
    samples: RSASamples | None = None
    #: where the sequences of a packed row begin and end, [number of sequences + 1]
    bounds: Tensor | None = None
    #: positions that copies of captions have added to each row
    num_copied: int = 0
    #: what the caption mask rides in has this type
    loss_mask_dtype: torch.dtype | None = None

    # transport (on stages after the first)
    #: rows that came behind the hidden state of the stage before, [K, B, H] or, behind packed samples, [n * K, 1, H]
    payload_KBH: Tensor | None = None

    # the splice (on the first stage)
    #: where the text positions lie in the decoder's row, [B, S]
    positions_BS: Tensor | None = None
    #: how long that row is on this context-parallel rank
    own_length: int | None = None
    #: where in its row the copy of each caption begins, [B]
    start_B: Tensor | None = None

    # capture
    #: image vectors of each vision layer, [n, D]
    v: dict[int, Tensor] = field(default_factory=dict)
    #: states of the text layers that this stage has, [L, B, E]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    #: of those that stages before it have, the sums over this context-parallel rank's caption rows, [n, E]
    sums: dict[int, Tensor] = field(default_factory=dict)
    caption_mask_BL: Tensor | None = None
