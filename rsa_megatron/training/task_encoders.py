"""The task encoders of a run's data, from its arguments; and the architecture and the tokenizer, which they need as others do."""

import functools

from transformers import AutoTokenizer

from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_config import find_architecture
from rsa_megatron.training.embedding_arguments import image_embeddings


def task_encoder(args, *, say_skipped: bool, image_aspect_ratio: str | None = None) -> LlavaTaskEncoder:
    """Return the encoder of a row a sample: evaluation's, and training's without packing."""
    return LlavaTaskEncoder(**_settings(args, say_skipped, image_aspect_ratio))


def training_task_encoder(args, *, say_skipped: bool) -> LlavaTaskEncoder | PackingTaskEncoder:
    """Return training's encoder, which packs rows where the run has a packing buffer."""
    if not args.packing_buffer_size:
        return task_encoder(args, say_skipped=say_skipped)
    return PackingTaskEncoder(
        **_settings(args, say_skipped),
        row_length=args.seq_length,
        max_tiles_per_row=args.packing_max_tiles,
        multiple_of=2 * args.context_parallel_size if args.context_parallel_size > 1 else 1,
        copies_captions=args.copies_captions,
    )


def _settings(args, say_skipped: bool, image_aspect_ratio: str | None = None) -> dict:
    architecture = architecture_of(args)
    size = architecture.vision.image_size
    grids = [(rows * size, columns * size) for rows, columns in args.image_grids or []]
    return dict(
        tokenizer=load_tokenizer(args),
        image_size=size,
        patch_size=architecture.vision.patch_size,
        image_aspect_ratio=image_aspect_ratio or args.image_aspect_ratio,
        grid_pinpoints=grids or architecture.grid_pinpoints,
        max_tiles=architecture.max_tiles,
        max_sequence_length=min(args.seq_length, args.max_position_embeddings),  # a packed row may be longer
        template=args.template,
        label_style=args.label_style,
        embeddings=image_embeddings(args),
        say_skipped=say_skipped,
    )


def architecture_of(args) -> Architecture:
    return find_architecture(args.model).with_arguments(vars(args))


@functools.cache
def _tokenizer(path: str):
    return AutoTokenizer.from_pretrained(path)


def load_tokenizer(args):
    """The Hugging Face tokenizer; Megatron's own wrapper of it hides the special tokens."""
    return _tokenizer(args.tokenizer_model)
