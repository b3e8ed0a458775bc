"""The task encoders of a run's data, from its arguments; and the architecture and the tokenizer, which they need as others do."""

import functools
from pathlib import Path

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
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of transformers, huggingface_hub or tokenizers, whose words are about the Hub
        remedy = "name a folder with a tokenizer in Hugging Face format"
        if not Path(path).is_dir():
            only_a_folder = path.startswith((".", "/", "~")) or path.count("/") > 1
            elsewhere = "" if only_a_folder else ", and the Hugging Face Hub does not give one of that name"
            raise ValueError(f"--tokenizer-model {path}: there is no such folder{elsewhere}; {remedy}") from error
        if not any(Path(path, name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            raise ValueError(f"--tokenizer-model {path}: there is no tokenizer_config.json in it; {remedy}") from error
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"--tokenizer-model {path}: its tokenizer cannot be loaded ({said}); {remedy}") from error


def load_tokenizer(args):
    """The Hugging Face tokenizer; Megatron's own wrapper of it hides the special tokens."""
    return _tokenizer(args.tokenizer_model)
