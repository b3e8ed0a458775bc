"""What a batch holds: the contract between data/, which makes it, and hooks/ and training/, which train on it.

Shapes: B rows, n samples (B of them, or those packed into one row), S text positions (an image is one position), T image tiles in
the whole batch.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RSASamples:
    """What the RSA loss must know of a batch: which samples are selected, and where the caption and the image are. int64."""

    #: 1 for a sample that is one image with its caption and may enter the kernels, [n]
    eligible: Tensor
    #: 1 where the token AT this position is the caption's (not where it is the next one's label), [B, S]; in a packed row, [1, S],
    #: s where it is the caption of sample s = 1 .. n
    caption_mask: Tensor
    #: tiles of each sample, [n]; the tiles of sample 0 come first in LlavaBatch.images, then those of sample 1, ...
    num_tiles: Tensor
    #: the same number for the same sample on every pipeline stage, [n]; non-negative
    sample_id: Tensor
    #: in a packed row: caption_mask marks copies of the captions, which are sequences of their own (--rsa-text-source caption)
    captions_are_copies: bool = False


@dataclass
class LlavaBatch:
    """One micro-batch, as LLaVAModel.forward takes it.

    In a packed row (B = 1) each sample stands as a sequence of its own, with its last token, which is a label alone elsewhere: the
    loss mask leaves that position out. (LLaVAModel drops the label of a token before an image, and a sample may begin with one.)
    """

    #: token ids, [B, S] int64; the image token's id stands once for each image
    tokens: Tensor
    #: the token that follows each position, [B, S] int64
    labels: Tensor
    #: 1 where that next token is to be predicted, [B, S] float32; RSA takes any weights of 0 or more
    loss_mask: Tensor
    #: tiles of all images in order, [T, 3, height, width] float32; or precomputed embeddings, [T, D]
    images: Tensor
    #: how each image lies in its tiles, [number of images, 6] int64 (anyres.ImageLayout.as_numbers)
    image_layouts: Tensor
    #: positions of each sequence once its images are spliced in, [B] int64; the rest of it is padding
    row_lengths: Tensor
    #: which samples enter the RSA loss
    rsa: RSASamples
    #: where each sample comes from, n strings, for messages
    keys: list[str]
    #: each sample's record as it is stored, n
    records: list[dict]
    #: samples that were skipped since the batch before this one
    num_skipped: int = 0
    #: samples of this batch whose text was truncated to the longest sequence
    num_truncated: int = 0
    #: positions of each sequence of a packed row in order, images spliced in, [m] int64: its samples, and behind each the copy of its
    #: caption where there is one (--rsa-text-source caption); None where each row is one sample
    sequence_lengths: Tensor | None = None
    #: Energon's key by which the batch can be rebuilt; Energon sets it
    __restore_key__: tuple = ()

    @property
    def num_samples(self) -> int:
        """Samples that are trained on; those that fill up the last batch of an epoch have no key."""
        return sum(key != "" for key in self.keys)
