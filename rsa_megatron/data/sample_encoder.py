"""What the task encoders of LLaVA data share: how one sample is read and truncated, and how one that cannot be used is skipped."""

import bisect
import copy
import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from megatron.energon import Cooker, DefaultTaskEncoder
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors import Sample
from torch import Tensor
from torch.utils.data import default_collate

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.data import conversation
from rsa_megatron.data.cookers import cook, read_stored_record
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


class SampleEncoder(PreparedLeaves, DefaultTaskEncoder):
    """Reads samples of images with conversations.

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

    def of_one_epoch(self, batch_size: int, shuffle_buffer_size: int) -> Self:
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

    def _read(self, sample: StoredSample) -> tuple[dict, conversation.EncodedText, dict[str, bytes | Exception]]:
        """Return a sample's record, its text as tokens, and its images by name, one for each <image>, not decoded.

        Raises:
            ValueError, Unusable: it cannot be trained on; says why.
        """
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
        return record, text, parts

    def _count_positions(self, text: conversation.EncodedText, layouts: list[ImageLayout], is_pair: bool) -> int:
        """Count the positions that a sample takes, each image being its number of tokens.

        Args:
            is_pair: whether it is one image and a caption of a data set that takes part in RSA.
        """
        raise NotImplementedError

    def _count_image_tokens(self, layouts: list[ImageLayout]) -> int:
        return sum(layout.num_tokens(self.tokens_per_side, self.max_tiles) for layout in layouts)

    def _truncate(
        self, text: conversation.EncodedText, layouts: list[ImageLayout], is_pair: bool, room: int
    ) -> conversation.EncodedText:
        """Truncate the text at its end to so many positions; the text itself where it fits.

        Raises:
            ValueError: what fits has not all images, or no target.
        """
        num_positions = self._count_positions(text, layouts, is_pair)
        if num_positions <= room:
            return text
        lengths = range(len(text.tokens) + 1)
        fits = bisect.bisect(
            lengths, room, key=lambda length: self._count_positions(text.truncate(length), layouts, is_pair)
        )
        cut = text.truncate(max(fits - 1, 0))
        # The last token is only a label: an image there would have tiles and no position.
        if cut.tokens[:-1].count(self._image_token_id) < len(layouts) or not any(cut.is_target[1:]):
            raise ValueError(
                f"{num_positions} positions do not fit --seq-length {room}, and what fits has no training target: raise it"
            )
        return cut

    def _skip(self, line: str) -> None:
        self._num_skipped += 1
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            # Something is wrong with all of them: continuing would loop through the data set forever.
            raise FatalSampleError(f"{_MOST_SKIPPED_IN_A_ROW} samples in a row were skipped; the last: {line}")
        if self.say_skipped:
            logger.warning(line)

    def _take_num_skipped(self) -> int:
        """Return how many samples were skipped since the batch before."""
        num_skipped, self._num_skipped = self._num_skipped, 0
        return num_skipped


def is_pair(sample: Sample, num_images: int) -> bool:
    """Whether a sample is an image-caption pair that takes part in RSA, as the paper asks for (section 3.3)."""
    return read_rsa_flag(sample.__subflavors__, default=False) and num_images == 1


def join_tiles(tiles: list[Tensor]) -> Tensor:
    """Join all samples' tiles, [T, 3, height, width]; not copied where only one sample has any.

    In a data worker torch's default_collate writes straight into the memory that it shares with the training process, where
    the batch would have to be copied otherwise.
    """
    with_images = [each for each in tiles if len(each)] or tiles[:1]
    return with_images[0] if len(with_images) == 1 else default_collate([tile for each in with_images for tile in each])


def sample_id(key: str) -> int:
    """Hash a sample's key to a number, the same in every process: 63 bits."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def format_skipped(sample: Sample, error: Exception) -> str:
    """Say in a line which sample is skipped, and why; of a JSONL's also which image, as decoding knows no file names."""
    reason = str(error) if isinstance(error, (ValueError, OSError, Unusable)) else f"{type(error).__name__}: {error}"
    line = f"skipped sample {sample.__key__}{_format_source(sample)}: {reason}"
    image = sample.record.get("image") if isinstance(sample.record, dict) else None
    if image and str(image) not in reason:
        line += f" (image {str(image)[:200]})"
    return line


def _format_source(sample: Sample) -> str:
    sources = sample.__sources__ or ()
    return f" of {sources[0].dataset_path}" if sources else ""
