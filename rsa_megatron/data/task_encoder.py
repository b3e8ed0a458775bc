"""From a stored sample to what the model trains on: Energon's task encoder for LLaVA data.

cookers.py says how samples are stored.
The data set's subflavor `rsa: true` lets its samples into the RSA loss, one image and a caption each.

A sample that cannot be used is skipped, with one line that says which and why, and counted; the count travels
with the next batch, so that the training log can show it. Which samples those are depends on the data alone:
every pipeline stage that reads the same data skips the same ones.
"""

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.energon import Cooker, DefaultTaskEncoder, SkipSample, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors import Sample
from torch import Tensor
from torch.utils.data import default_collate

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch, RSASamples
from rsa_megatron.data import conversation
from rsa_megatron.data.cookers import check_readable, cook, read_stored_record
from rsa_megatron.data.image_embeddings import ImageEmbeddings
from rsa_megatron.data.leaves import PreparedLeaves
from rsa_megatron.data.rsa_flag import read_rsa_flag
from rsa_megatron.data.single_epoch import shuffle_once
from rsa_megatron.data.sources.record import Unusable
from rsa_megatron.data.stored_parts import StoredSample
from rsa_megatron.data.tiles import ImageTiler

if TYPE_CHECKING:  # only for annotations
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MOST_SKIPPED_IN_A_ROW = 100


@dataclass(kw_only=True)
class EncodedSample(Sample):
    """One sequence of a batch."""

    text: conversation.EncodedText
    layouts: list[ImageLayout]
    #: tiles of the sample's images in order, [n, 3, height, width]
    tiles: Tensor
    eligible: bool
    record: dict
    #: positions of the sequence, image tokens included; 0 for an empty sample
    row_length: int
    #: whether its text was longer
    is_truncated: bool


class LlavaTaskEncoder(PreparedLeaves, DefaultTaskEncoder[StoredSample, EncodedSample, LlavaBatch, LlavaBatch]):
    """Encodes samples of images with conversations.

    Args:
        tokenizer: with an <image> token.
        image_size: side of a tile, pixels.
        patch_size: of the vision tower, pixels; what is left of image_size / patch_size is no token.
        max_sequence_length: longest sequence, image tokens included; the text of a longer sample is truncated.
        template, label_style: how a conversation becomes tokens, and which are targets (conversation.py).
        image_aspect_ratio, grid_pinpoints: how an image is cut into tiles (tiles.py).
        max_tiles: tokens of how many tiles a grid may keep (anyres.py).
        embeddings: reads images as embeddings; the arguments of pixels and tiles then do not count.
        say_skipped: whether to print the line about a skipped sample; it is counted in any case.
    """

    cookers = [Cooker(cook)]
    decoder = None  # bytes are decoded here, where one bad file can be named and skipped

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        image_size: int,
        patch_size: int,
        max_sequence_length: int,
        template: str,
        label_style: str = "llava",
        image_aspect_ratio: str,
        grid_pinpoints: Sequence[tuple[int, int]],
        max_tiles: int,
        embeddings: ImageEmbeddings | None = None,
        say_skipped: bool = True,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.template = template
        self.label_style = label_style
        self.tokens_per_side = image_size // patch_size
        self.max_tiles = max_tiles
        self.max_sequence_length = max_sequence_length
        self.say_skipped = say_skipped
        # Of an encoder of one epoch: samples of a batch, and of the shuffle buffer.
        self._fill_to = self._shuffle_once = None
        self._image_token_id = tokenizer.convert_tokens_to_ids(conversation.IMAGE_TOKEN)
        self._images = embeddings or ImageTiler(
            image_size=image_size, image_aspect_ratio=image_aspect_ratio, grid_pinpoints=grid_pinpoints
        )
        self._num_skipped = self._num_skipped_in_a_row = 0

    def of_one_epoch(self, batch_size: int, shuffle_buffer_size: int) -> "LlavaTaskEncoder":
        """Return a copy for one pass over the data, of which the number of batches is known before.

        A sample that cannot be used is replaced by an empty one, and a batch of fewer samples is filled up. The data set
        is shuffled here, not by Energon's `shuffle_buffer_size` (single_epoch.py).
        """
        other = copy.copy(self)
        other._fill_to, other._shuffle_once = batch_size, shuffle_buffer_size
        return other

    def build_encode_sample(self, dataset, *, worker_config):
        if self._shuffle_once is not None:
            dataset = shuffle_once(dataset, self._shuffle_once, worker_config)
        return super().build_encode_sample(dataset, worker_config=worker_config)

    def explain_unusable(self, sample: StoredSample) -> str | None:
        """Return the line that training gives as it skips a sample; None for one that it trains on."""
        try:
            self._encode(sample)
        except Exception as error:  # as in encode_sample
            return _format_skipped(sample, error)
        return None

    @stateless
    def encode_sample(self, sample: StoredSample) -> EncodedSample:
        try:
            encoded = self._encode(sample)
        except Exception as error:  # whatever lies in a file of millions; a fault of all samples ends the run below
            self._skip(sample, error)
            if not self._fill_to:
                raise SkipSample from error
            return EncodedSample.derive_from(sample, **self._make_empty())
        self._num_skipped_in_a_row = 0
        return encoded

    def batch(self, samples: list[EncodedSample]) -> LlavaBatch:
        samples = samples + [EncodedSample(__key__="", __restore_key__=(), **self._make_empty())] * (
            (self._fill_to or 0) - len(samples)
        )
        texts = [sample.text for sample in samples]
        # Inputs are all tokens but the last, labels all but the first.
        length = max(len(text.tokens) for text in texts) - 1
        pad = self.tokenizer.pad_token_id

        def rows(marks_of, first, last, filler=0):
            rows = [marks_of(text)[first : len(text.tokens) + last] for text in texts]
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])

        num_skipped, self._num_skipped = self._num_skipped, 0
        layouts = [layout.as_numbers() for sample in samples for layout in sample.layouts]
        return LlavaBatch(
            tokens=rows(lambda text: text.tokens, 0, -1, pad),
            labels=rows(lambda text: text.tokens, 1, 0, pad),
            loss_mask=rows(lambda text: text.is_target, 1, 0).float(),
            images=_join_tiles([sample.tiles for sample in samples]),
            image_layouts=torch.tensor(layouts, dtype=torch.int64).reshape(len(layouts), 6),
            row_lengths=torch.tensor([sample.row_length for sample in samples]),
            rsa=RSASamples(
                eligible=torch.tensor([sample.eligible for sample in samples]).long(),
                caption_mask=rows(lambda text: text.is_caption, 0, -1).long(),
                num_tiles=torch.tensor([len(sample.tiles) for sample in samples]),
                sample_id=torch.tensor([sample_id(sample.__key__) for sample in samples]),
            ),
            keys=[sample.__key__ for sample in samples],
            records=[sample.record for sample in samples],
            num_skipped=num_skipped,
            num_truncated=sum(sample.is_truncated for sample in samples),
        )

    def _encode(self, sample: StoredSample) -> EncodedSample:
        parts = {name: part for name, part in sample.images.items() if self._images.part.fullmatch(name)}
        kind = "image(s)" if isinstance(self._images, ImageTiler) else "precomputed embedding(s) (.npy)"
        record = read_stored_record(sample.record, len(parts or sample.images), kind)
        text = conversation.encode(self.tokenizer, record["conversations"], self.template, label_style=self.label_style)
        num_image_tokens = text.tokens.count(self._image_token_id)
        if num_image_tokens != len(parts):
            remedy = " in pixels; its embeddings (.npy) are read with --image-positions" * (
                isinstance(self._images, ImageTiler) and len(sample.images) > len(parts)
            )
            raise ValueError(
                f"its text has {num_image_tokens} {conversation.IMAGE_TOKEN} and the sample {len(parts)} {kind}{remedy}"
            )
        images = self._images.decode(check_readable(parts))
        layouts = self._images.layouts(images)
        whole, text = text, self._truncate(text, layouts)
        return EncodedSample.derive_from(
            sample,
            text=text,
            layouts=layouts,
            tiles=self._images.tiles(images),
            # An image-caption pair, as the paper asks for (section 3.3), whose caption is not truncated away.
            eligible=read_rsa_flag(sample.__subflavors__, default=False)
            and len(images) == 1
            and any(text.is_caption[:-1]),
            record=record,
            row_length=len(text.tokens) - 1 + self._count_image_tokens(layouts) - len(layouts),
            is_truncated=text is not whole,
        )

    def _count_image_tokens(self, layouts: list[ImageLayout]) -> int:
        return sum(layout.num_tokens(self.tokens_per_side, self.max_tiles) for layout in layouts)

    def _truncate(self, text: conversation.EncodedText, layouts: list[ImageLayout]) -> conversation.EncodedText:
        """Truncate to the longest sequence: all tokens but the last, each image counting as its number of tokens."""
        room = self.max_sequence_length + 1 + len(layouts) - self._count_image_tokens(layouts)
        if len(text.tokens) <= room:
            return text
        cut = text.truncate(max(room, 0))
        # The last token is only a label: an image there would have tiles and no position.
        if cut.tokens[:-1].count(self._image_token_id) < len(layouts) or not any(cut.is_target[1:]):
            raise ValueError(
                f"{len(text.tokens) - 1 + self._count_image_tokens(layouts) - len(layouts)} positions do not fit --seq-length "
                f"{self.max_sequence_length}, and what fits has no training target: raise it"
            )
        return cut

    def _make_empty(self) -> dict:
        """Make the fields of an empty sample: a sequence of padding, no target, no image."""
        pad = self.tokenizer.pad_token_id
        text = conversation.EncodedText([pad] * 2, [False] * 2, [False] * 2)
        return dict(
            text=text,
            layouts=[],
            tiles=self._images.tiles([]),
            eligible=False,
            record={},
            row_length=0,
            is_truncated=False,
        )

    def _skip(self, sample: StoredSample, error: Exception) -> None:
        self._num_skipped += 1
        self._num_skipped_in_a_row += 1
        line = _format_skipped(sample, error)
        if self._num_skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            # Something is wrong with all of them: continuing would loop through the data set forever.
            raise FatalSampleError(f"{_MOST_SKIPPED_IN_A_ROW} samples in a row were skipped; the last: {line}")
        if self.say_skipped:
            logger.warning(line)


def _join_tiles(tiles: list[Tensor]) -> Tensor:
    """Join all samples' tiles, [T, 3, height, width]; not copied where only one sample has any.

    In a data worker torch's default_collate writes straight into the memory that it shares with the training process, where
    the batch would have to be copied otherwise.
    """
    with_images = [each for each in tiles if len(each)] or tiles[:1]
    return with_images[0] if len(with_images) == 1 else default_collate([tile for each in with_images for tile in each])


def sample_id(key: str) -> int:
    """Hash a sample's key to a number, the same in every process: 63 bits."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def _format_skipped(sample: StoredSample, error: Exception) -> str:
    reason = str(error) if isinstance(error, (ValueError, OSError, Unusable)) else f"{type(error).__name__}: {error}"
    line = f"skipped sample {sample.__key__}{_format_source(sample)}: {reason}"
    image = sample.record.get("image") if isinstance(sample.record, dict) else None
    if image and str(image) not in reason:  # of a JSONL: decoding knows no file names
        line += f" (image {str(image)[:200]})"
    return line


def _format_source(sample: StoredSample) -> str:
    sources = sample.__sources__ or ()
    return f" of {sources[0].dataset_path}" if sources else ""
