"""From a stored sample to what the model trains on: Energon's task encoder for LLaVA data, a row a sample.

cookers.py says how samples are stored.
The data set's subflavor `rsa: true` lets its samples into the RSA loss, one image and a caption each.

A sample that cannot be used is skipped, with one line that says which and why, and counted; the count travels
with the next batch, so that the training log can show it. Which samples those are depends on the data alone:
every pipeline stage that reads the same data skips the same ones.
"""

from dataclasses import dataclass

import torch
from megatron.energon import SkipSample, stateless
from megatron.energon.flavors import Sample
from torch import Tensor

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch, RSASamples
from rsa_megatron.data import conversation
from rsa_megatron.data.cookers import check_readable
from rsa_megatron.data.sample_encoder import SampleEncoder, format_skipped, is_pair, join_tiles, sample_id
from rsa_megatron.data.stored_parts import StoredSample


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


class LlavaTaskEncoder(SampleEncoder):
    """Encodes samples of images with conversations, each as a row of a batch. Arguments: SampleEncoder's."""

    def explain_unusable(self, sample: StoredSample) -> str | None:
        """Return the line that training gives as it skips a sample; None for one that it trains on."""
        try:
            self._encode(sample)
        except Exception as error:  # as in encode_sample
            return format_skipped(sample, error)
        return None

    @stateless
    def encode_sample(self, sample: StoredSample) -> EncodedSample:
        try:
            encoded = self._encode(sample)
        except Exception as error:  # whatever lies in a file of millions; a fault of all samples ends the run below
            self._skip(format_skipped(sample, error))
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

        layouts = [layout.as_numbers() for sample in samples for layout in sample.layouts]
        return LlavaBatch(
            tokens=rows(lambda text: text.tokens, 0, -1, pad),
            labels=rows(lambda text: text.tokens, 1, 0, pad),
            loss_mask=rows(lambda text: text.is_target, 1, 0).float(),
            images=join_tiles([sample.tiles for sample in samples]),
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
            num_skipped=self._take_num_skipped(),
            num_truncated=sum(sample.is_truncated for sample in samples),
        )

    def _encode(self, sample: StoredSample) -> EncodedSample:
        record, text, parts = self._read(sample)
        images = self._images.decode(check_readable(parts))
        layouts = self._images.layouts(images)
        pair = is_pair(sample, len(images))
        whole, text = text, self._truncate(text, layouts, pair, self.max_sequence_length)
        return EncodedSample.derive_from(
            sample,
            text=text,
            layouts=layouts,
            tiles=self._images.tiles(images),
            eligible=pair and any(text.is_caption[:-1]),  # else its caption is truncated away
            record=record,
            row_length=self._count_positions(text, layouts, pair),
            is_truncated=text is not whole,
        )

    def _count_positions(self, text: conversation.EncodedText, layouts: list[ImageLayout], is_pair: bool) -> int:
        # All tokens but the last, which is a label alone.
        return len(text.tokens) - 1 + self._count_image_tokens(layouts) - len(layouts)

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
