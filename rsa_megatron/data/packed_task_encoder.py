"""Several samples in a row: Energon's task encoder for packed training.

Before the packing buffer a sample is read as far as its length: record, tokens, and the headers of its images (`preencode_sample`). A
buffer that is full is divided among rows (packing.py), and the images of a row are decoded when its turn comes (`postencode_sample`).
So a buffer holds files as they are stored, not pixels: about 0.2 MB a sample with a photograph, where its tiles take 1.8 MB each.

Energon loses a whole buffer where dividing it fails, so nothing that lies in the data may fail there or before: a sample that cannot be
used passes the buffer with its fault, and is skipped, named and counted with the row that it comes to. After a restart, when the
buffer is read again, so is one whose file is gone since.

Shapes: n samples of a row, m sequences (samples and copies of captions), S tokens, T tiles.
"""

from dataclasses import dataclass, field, replace

import torch
from megatron.energon import SkipSample, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors import Sample
from megatron.energon.wrappers import PackingDataset
from torch import Tensor

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch, RSASamples
from rsa_megatron.data.conversation import EncodedText
from rsa_megatron.data.cookers import check_readable
from rsa_megatron.data.packing import pack_rows
from rsa_megatron.data.sample_encoder import SampleEncoder, format_skipped, is_pair, join_tiles, sample_id
from rsa_megatron.data.stored_parts import StoredSample


@dataclass(kw_only=True)
class BufferedSample(Sample):
    """A sample in the packing buffer, and, once it has tiles, of a row."""

    #: the line that says why it is skipped; the fields below then do not count
    fault: str | None = None
    text: EncodedText = field(default_factory=EncodedText)
    layouts: list[ImageLayout] = field(default_factory=list)
    #: its images by name, as they are stored
    parts: dict[str, bytes] = field(default_factory=dict)
    #: of its images in order, [n, 3, height, width]; None in the buffer
    tiles: Tensor | None = None
    eligible: bool = False
    record: dict = field(default_factory=dict)
    #: positions of its sequence, its last token and its image tokens included, and of the copy of its caption
    length: int = 0
    copy_length: int = 0
    #: whether its text was longer
    is_truncated: bool = False

    @property
    def num_tiles(self) -> int:
        return sum(layout.num_tiles for layout in self.layouts)


class PackingTaskEncoder(SampleEncoder):
    """Encodes samples of images with conversations, several to a row.

    Args:
        row_length: most positions of a row (--seq-length).
        max_tiles_per_row: most image tiles of a row (--packing-max-tiles, packing.py).
        copies_captions: whether behind each sample that takes part in RSA its caption stands once more, as a sequence of its own
            (--rsa-text-source caption).
        multiple_of: each sequence is filled up to a multiple of so many positions: what context-parallel ranks divide it into.
        Others: SampleEncoder's.
    """

    def __init__(
        self,
        *args,
        row_length: int,
        max_tiles_per_row: int,
        copies_captions: bool = False,
        multiple_of: int = 1,
        **settings,
    ):
        super().__init__(*args, **settings)
        self.row_length, self.max_tiles_per_row = row_length, max_tiles_per_row
        self.copies_captions, self.multiple_of = copies_captions, multiple_of

    # Energon finds out by the functions that a task encoder has in which order to call them.

    @stateless
    def preencode_sample(self, sample: StoredSample) -> BufferedSample:
        try:
            return self._read_lengths(sample)
        except Exception as error:  # whatever lies in a file of millions
            return BufferedSample.derive_from(sample, fault=format_skipped(sample, error))

    def select_samples_to_pack(self, samples: list[BufferedSample]) -> list[list[BufferedSample]]:
        faulty = [sample for sample in samples if sample.fault]
        samples = [sample for sample in samples if not sample.fault]
        rows = pack_rows(
            [sample.length + sample.copy_length for sample in samples],
            [sample.num_tiles for sample in samples],
            [sample.__key__ for sample in samples],
            self.row_length,
            self.max_tiles_per_row,
        )
        rows = [[samples[number] for number in row] for row in rows] or [[]]
        for number, sample in enumerate(faulty):
            rows[number % len(rows)].append(sample)
        return rows

    @stateless
    def postencode_sample(self, sample: BufferedSample) -> BufferedSample:
        if sample.fault is None:
            try:
                tiles = self._decode_tiles(sample)
            except Exception as error:
                sample.fault = format_skipped(sample, error)
        if sample.fault is not None:
            self._skip(sample.fault)
            raise SkipSample
        self._num_skipped_in_a_row = 0
        return replace(sample, tiles=tiles, parts={})

    @stateless
    def pack_selected_samples(self, samples: list[BufferedSample]) -> LlavaBatch:
        if not samples:  # all of the row were skipped
            return self.batch([])
        sequences = [
            sequence for number, sample in enumerate(samples, 1) for sequence in self._sequences(sample, number)
        ]
        lengths = [length for sample in samples for length in (sample.length, sample.copy_length) if length]
        if sum(lengths) > self.row_length:
            raise FatalSampleError(
                f"a row of the saved data position has {sum(lengths)} positions, more than --seq-length {self.row_length}: the tokenizer, "
                "--template or the grids of images are others than before; set them back, or pass --restart-data"
            )
        tokens, labels, loss_mask, caption_mask = (
            [mark for sequence in sequences for mark in sequence[kind]] for kind in range(4)
        )
        layouts = [layout.as_numbers() for sample in samples for layout in sample.layouts]
        return LlavaBatch(
            tokens=torch.tensor([tokens]),
            labels=torch.tensor([labels]),
            loss_mask=torch.tensor([loss_mask]).float(),
            images=join_tiles([sample.tiles for sample in samples]),
            image_layouts=torch.tensor(layouts, dtype=torch.int64).reshape(len(layouts), 6),
            row_lengths=torch.tensor([sum(lengths)]),
            sequence_lengths=torch.tensor(lengths),
            rsa=RSASamples(
                eligible=torch.tensor([sample.eligible for sample in samples]).long(),
                caption_mask=torch.tensor([caption_mask]),
                num_tiles=torch.tensor([sample.num_tiles for sample in samples]),
                sample_id=torch.tensor([sample_id(sample.__key__) for sample in samples]),
                captions_are_copies=self.copies_captions,
            ),
            keys=[sample.__key__ for sample in samples],
            records=[sample.record for sample in samples],
            num_skipped=self._take_num_skipped(),
            num_truncated=sum(sample.is_truncated for sample in samples),
        )

    def batch(self, rows: list[LlavaBatch]) -> LlavaBatch:
        """Return the only row; without one, a row of one empty sample: packed too, as data-parallel ranks go through it together."""
        if rows:
            (row,) = rows
            return row
        zero = torch.zeros(1, dtype=torch.int64)
        pad = torch.full((1, self.multiple_of), self.tokenizer.pad_token_id)
        nothing = torch.zeros_like(pad)
        return LlavaBatch(
            tokens=pad,
            labels=pad,
            loss_mask=nothing.float(),
            images=self._images.tiles([]),
            image_layouts=torch.zeros(0, 6, dtype=torch.int64),
            row_lengths=zero,
            sequence_lengths=torch.tensor([self.multiple_of]),
            rsa=RSASamples(
                eligible=zero,
                caption_mask=nothing,
                num_tiles=zero,
                sample_id=torch.tensor([sample_id("")]),
                captions_are_copies=self.copies_captions,
            ),
            keys=[""],
            records=[{}],
            num_skipped=self._take_num_skipped(),
        )

    def build_batch(self, dataset, *, batch_size, batch_drop_last=False, packing_buffer_size=None, worker_config):
        """Build rows of a buffer: a row is a micro-batch."""
        if packing_buffer_size is None or batch_size != 1:
            raise ValueError("packed rows need a packing_buffer_size, and a row is a micro-batch of 1")
        return _QuietPackingDataset(
            dataset,
            buffer_size=packing_buffer_size,
            pre_packer=self.select_samples_to_pack,
            sample_encoder=self.postencode_sample,
            sample_encoder_stateless=True,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )

    def _read_lengths(self, sample: StoredSample) -> BufferedSample:
        record, text, parts = self._read(sample)
        layouts = self._images.read_layouts(check_readable(parts))
        pair = is_pair(sample, len(layouts))
        whole, text = text, self._truncate(text, layouts, pair, min(self.row_length, self.max_sequence_length + 1))
        copy_length = self._count_copy(text, pair)
        return BufferedSample.derive_from(
            sample,
            text=text,
            layouts=layouts,
            parts=parts,
            eligible=pair and any(text.is_caption[:-1]),  # else its caption is truncated away
            record=record,
            length=self._count_positions(text, layouts, pair) - copy_length,
            copy_length=copy_length,
            is_truncated=text is not whole,
        )

    def _count_positions(self, text: EncodedText, layouts: list[ImageLayout], is_pair: bool) -> int:
        num_positions = len(text.tokens) + self._count_image_tokens(layouts) - len(layouts)
        return self._fill(num_positions) + self._count_copy(text, is_pair)

    def _count_copy(self, text: EncodedText, is_pair: bool) -> int:
        """Count the caption's tokens that a row of the sample alone would have, and the padding behind their copy."""
        num_tokens = sum(text.is_caption[:-1]) if is_pair and self.copies_captions else 0
        return self._fill(num_tokens + (num_tokens > 0))

    def _fill(self, num_positions: int) -> int:
        return -(-num_positions // self.multiple_of) * self.multiple_of

    def _decode_tiles(self, sample: BufferedSample) -> Tensor:
        images = self._images.decode(sample.parts)
        if self._images.layouts(images) != sample.layouts:
            raise ValueError("its image has another size than its header says")
        return self._images.tiles(images)

    def _sequences(self, sample: BufferedSample, number: int):
        """Yield tokens, labels, loss mask and caption mask of a sample, the number-th of its row, and of the copy of its caption."""
        text, pad = sample.text, self.tokenizer.pad_token_id
        # The last token stands in the row too, without a label: an image that the next sample begins with would take it away.
        is_caption = [*text.is_caption[:-1], False]
        marks = [0 if sample.copy_length else number * is_marked for is_marked in is_caption]
        num_positions = len(text.tokens) + self._count_image_tokens(sample.layouts) - len(sample.layouts)
        pads, zeros = ([filler] * (sample.length - num_positions) for filler in (pad, 0))
        yield (
            [*text.tokens, *pads],
            [*text.tokens[1:], pad, *pads],
            [*text.is_target[1:], False, *zeros],
            [*marks, *zeros],
        )
        if sample.copy_length:
            copy = [token for token, is_marked in zip(text.tokens, is_caption) if is_marked]
            pads, zeros = ([filler] * (sample.copy_length - len(copy)) for filler in (pad, 0))
            nothing = [0] * sample.copy_length
            yield [*copy, *pads], [pad] * sample.copy_length, nothing, [*[number] * len(copy), *zeros]


class _QuietPackingDataset(PackingDataset):
    """Fills its first buffer without a progress bar from each data worker, for which Energon has no switch."""

    def _fill_reading_buffer(self, source_iter, log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter)
