"""What a plan is about: a run, and its layout over ranks. Only sizes; memory.py and step_time.py estimate from them."""

from collections.abc import Collection
from dataclasses import dataclass

from rsa_megatron.models.architectures import Architecture


@dataclass(frozen=True)
class Layout:
    """How a run is split over ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batch_size: int = 1
    #: of a step, on each data-parallel rank
    num_micro_batches: int = 1
    #: "none", "selective" or "full"
    recompute: str = "none"
    distributed_optimizer: bool = False
    sequence_parallel: bool = False

    @property
    def num_rows(self) -> int:
        """Count the rows that one RSA kernel compares: its pairs, if every row is one (Run.samples_per_row)."""
        return self.micro_batch_size * self.data


@dataclass(frozen=True)
class Run:
    """What is trained, and on what."""

    architecture: Architecture
    #: as --trainable names the modules
    trainable: Collection[str]
    #: positions of the longest row, --seq-length; under pipeline parallelism every one is padded to it
    row_length: int
    #: tiles of the row with most
    num_tiles: int = 1
    #: whether rows are packed, with how many samples in the mean
    packs: bool = False
    samples_per_row: float = 1
    bf16: bool = True
    #: Transformer Engine's layers, with flash attention; else Megatron's local ones
    transformer_engine: bool = True
    #: modules ("vision", "language") whose local layers have Megatron's own attention, which stores a matrix of scores,
    #: not that of local_attention.py: the decoder's do with --rsa-text-source caption
    keeps_scores: Collection[str] = ()
    #: whether the RSA loss is on
    rsa: bool = True

    def compares_pairs(self, layout: Layout) -> bool:
        """Return whether an RSA kernel of this layout has pairs to compare: two of its rows' samples at least."""
        return layout.num_rows * self.samples_per_row >= 2

    @property
    def number_size(self) -> int:
        """Bytes of an activation or parameter."""
        return 2 if self.bf16 else 4

    def trains(self, *modules: str) -> bool:
        return any(module in self.trainable for module in modules)

    def makes_scores(self, module: str) -> bool:
        """Return whether a layer of this module has a matrix of attention scores; Transformer Engine's never do."""
        return module in self.keeps_scores and not self.transformer_engine

    @property
    def trains_output(self) -> bool:
        """Whether the output layer's weight is trained: tied, it is the word embeddings."""
        return self.trains("embeddings" if self.architecture.decoder.tie_word_embeddings else "language")
