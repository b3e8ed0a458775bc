"""From a stored sample to what the model trains on: Energon's task encoder for LLaVA data.

A stored sample is an image (png, jpg, ...) and a json with LLaVA's "conversations"; text alone has no image.
The data set's subflavor `rsa: true` lets its samples into the RSA loss, one image and a caption each.

A sample that cannot be used is skipped, with one line that says which and why, and counted; the count travels
with the next batch, so that the training log can show it. Which samples those are depends on the data alone:
every pipeline stage that reads the same data skips the same ones.
"""

import hashlib
import io
import json
import logging
from dataclasses import dataclass

import torch
from megatron.energon import Cooker, DefaultTaskEncoder, SkipSample, basic_sample_keys, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors import Sample
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, SiglipImageProcessorPil

from rsa_megatron.batch import LlavaBatch, RSASamples
from rsa_megatron.data import conversation

logger = logging.getLogger(__name__)

_IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
_MOST_SKIPPED_IN_A_ROW = 100


@dataclass(kw_only=True)
class StoredSample(Sample):
    """What lies in the shard, not decoded yet."""

    image: bytes | None
    record: bytes | None


@dataclass(kw_only=True)
class EncodedSample(Sample):
    """One row of a batch."""

    text: conversation.EncodedText
    #: tiles of the sample's images, [n, 3, height, width]
    tiles: Tensor
    eligible: bool
    record: dict


@stateless
def cook(stored: dict) -> StoredSample:
    """Pick the image and the record out of a crude sample."""
    image = next((stored[extension] for extension in _IMAGE_EXTENSIONS if extension in stored), None)
    return StoredSample(**basic_sample_keys(stored), image=image, record=stored.get("json"))


class LlavaTaskEncoder(DefaultTaskEncoder[StoredSample, EncodedSample, LlavaBatch, LlavaBatch]):
    """Encodes samples of images with conversations.

    Args:
        tokenizer: with an <image> token.
        image_size: side of the square that an image is resized to, pixels.
        image_tokens: positions that an image takes in the decoder's sequence.
        max_sequence_length: longest row, image tokens included; a longer sample is skipped.
        template: "plain" or "chat" (conversation.py).
        say_skipped: whether to print the line about a skipped sample; its count is kept in any case.
    """

    cookers = [Cooker(cook)]
    decoder = None  # bytes are decoded here, where one bad file can be named and skipped

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_size: int,
        image_tokens: int,
        max_sequence_length: int,
        template: str,
        say_skipped: bool = True,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.template = template
        self.image_tokens = image_tokens
        self.max_sequence_length = max_sequence_length
        self.say_skipped = say_skipped
        self._image_token_id = tokenizer.convert_tokens_to_ids(conversation.IMAGE_TOKEN)
        # SigLIP's: squashed to a square, bicubic, to [-1, 1].
        self._processor = SiglipImageProcessorPil(
            size={"height": image_size, "width": image_size},
            resample=Image.Resampling.BICUBIC,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        self._empty_tiles = torch.empty(0, 3, image_size, image_size)
        self._num_skipped = self._num_skipped_in_a_row = 0

    @stateless
    def encode_sample(self, sample: StoredSample) -> EncodedSample:
        try:
            encoded = self._encode(sample)
        except Exception as error:  # whatever lies in a file of millions; what is wrong with all ends the run below
            self._skip(sample, error)
        self._num_skipped_in_a_row = 0
        return encoded

    def batch(self, samples: list[EncodedSample]) -> LlavaBatch:
        texts = [sample.text for sample in samples]
        # Inputs are all tokens but the last, labels all but the first.
        length = max(len(text.tokens) for text in texts) - 1
        pad = self.tokenizer.pad_token_id

        def rows(marks_of, first, last, filler=0):
            rows = [marks_of(text)[first : len(text.tokens) + last] for text in texts]
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])

        num_skipped, self._num_skipped = self._num_skipped, 0
        num_tiles = torch.tensor([len(sample.tiles) for sample in samples])
        return LlavaBatch(
            tokens=rows(lambda text: text.tokens, 0, -1, pad),
            labels=rows(lambda text: text.tokens, 1, 0, pad),
            loss_mask=rows(lambda text: text.is_target, 1, 0).float(),
            images=torch.cat([self._empty_tiles, *(sample.tiles for sample in samples)]),
            num_image_tiles=torch.ones(int(num_tiles.sum()), dtype=torch.int32),
            rsa=RSASamples(
                eligible=torch.tensor([sample.eligible for sample in samples]).long(),
                caption_mask=rows(lambda text: text.is_caption, 0, -1).long(),
                num_tiles=num_tiles,
                sample_id=torch.tensor([sample_id(sample.__key__) for sample in samples]),
            ),
            keys=[sample.__key__ for sample in samples],
            records=[sample.record for sample in samples],
            num_skipped=num_skipped,
        )

    def _encode(self, sample: StoredSample) -> EncodedSample:
        record = _read_record(sample.record)
        text = conversation.encode(self.tokenizer, record["conversations"], self.template)
        num_images = text.tokens.count(self._image_token_id)
        if num_images != (sample.image is not None):
            raise ValueError(
                f"its text has {num_images} {conversation.IMAGE_TOKEN} and the sample "
                f"{'an image' if sample.image is not None else 'no image'}"
            )
        row_length = len(text.tokens) - 1 + num_images * (self.image_tokens - 1)
        if row_length > self.max_sequence_length:
            raise ValueError(
                f"{row_length} positions do not fit --seq-length {self.max_sequence_length}; "
                "raise it or shorten the caption"
            )
        tiles = self._empty_tiles if sample.image is None else self._tiles(sample.image)
        wants_rsa = bool((sample.__subflavors__ or {}).get("rsa"))
        eligible = wants_rsa and num_images == 1 and any(text.is_caption)
        return EncodedSample.derive_from(sample, text=text, tiles=tiles, eligible=eligible, record=record)

    def _tiles(self, image: bytes) -> Tensor:
        with Image.open(io.BytesIO(image)) as opened:
            return self._processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]

    def _skip(self, sample: StoredSample, error: Exception) -> None:
        self._num_skipped += 1
        self._num_skipped_in_a_row += 1
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        line = f"skipped sample {sample.__key__}{_where(sample)}: {reason}"
        if self._num_skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            # Something is wrong with all of them: going on would spin through the data set for ever.
            raise FatalSampleError(f"{_MOST_SKIPPED_IN_A_ROW} samples in a row cannot be used; the last: {line}")
        if self.say_skipped:
            logger.warning(line)
        raise SkipSample from error


def sample_id(key: str) -> int:
    """A number for a sample's key, the same in every process: 63 bits of its hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def _read_record(record: bytes | None) -> dict:
    if record is None:
        raise ValueError("it has no .json")
    try:
        content = json.loads(record)
    except json.JSONDecodeError as error:
        raise ValueError(f"its .json cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("conversations"), list):
        raise ValueError('its .json has no list "conversations"')
    return content


def _where(sample: StoredSample) -> str:
    sources = sample.__sources__ or ()
    return f" of {sources[0].dataset_path}" if sources else ""
