"""Precomputed image embeddings instead of pixels: their flags, and what does not work with them."""

from pathlib import Path

from rsa_megatron.config import RSAConfig
from rsa_megatron.data.image_embeddings import ImageEmbeddings
from rsa_megatron.training.run_folder import TRACKER, run_of


def add_arguments(group) -> None:
    group.add_argument(
        "--image-positions",
        type=int,
        default=0,
        metavar="N",
        help="images are precomputed embeddings (.npy in the shards), each repeated in N positions; 0: pixels",
    )
    group.add_argument("--image-embedding-width", type=int, metavar="D", help="theirs; default: the tower's width")


def set_image_embeddings(args, rsa: RSAConfig, tower_width: int) -> str | None:
    """The width of images that come as embeddings, past the tower; and what does not go with them.

    Returns:
        A message where the projector is re-initialised.
    """
    args.projector_begins_anew = False
    if not args.image_positions:
        if args.image_embedding_width is not None:
            raise ValueError("--image-embedding-width is of images that come as embeddings: name --image-positions too")
        return check_projector(args, tower_width)
    if not 1 <= args.image_positions < args.seq_length:
        raise ValueError(
            f"--image-positions {args.image_positions} must be from 1 to below --seq-length {args.seq_length}, which "
            "holds the caption, too: name fewer positions or a longer row"
        )
    if args.image_embedding_width is None:
        args.image_embedding_width = tower_width
    if args.image_embedding_width < 1:
        raise ValueError(f"--image-embedding-width {args.image_embedding_width} must be at least 1")
    if "vision" in args.trainable:
        raise ValueError(
            "--trainable vision: images that come as embeddings pass the tower by; leave it frozen "
            "(--trainable projector embeddings language)"
        )
    for flag, layers in (
        ("--mutual-knn-layers", [vision for vision, _ in args.mutual_knn_layers]),
        ("--rsa-layers", [pair.vision for pair in rsa.layer_pairs]),
    ):
        if set(layers) != {-1}:
            raise ValueError(f"{flag}: a precomputed image embedding has no vision layer but -1")
    return check_projector(args, tower_width)


def image_embeddings(args) -> ImageEmbeddings | None:
    """What reads them from a sample; None where images come as pixels."""
    positions = args.image_positions
    return ImageEmbeddings(width=args.image_embedding_width, positions=positions) if positions else None


def check_projector(args, tower_width: int) -> str | None:
    """Check that the checkpoint's projector has this run's input width; for one trained on pixels, request a re-initialised projector."""
    own = args.load and Path(args.load, TRACKER).is_file()
    folder = args.load if own else args.pretrained_checkpoint
    if not folder:
        return None
    of_checkpoint, width = run_of(folder).get("image_embedding_width"), args.image_embedding_width or tower_width
    if (of_checkpoint or tower_width) == width:
        return None
    if of_checkpoint:
        raise ValueError(
            f"{folder}: its projector takes embeddings of {of_checkpoint} numbers, this run's is to take {width}: name "
            f"--image-positions N --image-embedding-width {of_checkpoint}, with data that has such embeddings"
        )
    if own:
        raise ValueError(
            f"--load {folder}: it is a run on pixels, whose optimizer has no projector for embeddings of {width} numbers; "
            "name it as --pretrained-checkpoint, whose projector is then re-initialised"
        )
    args.projector_begins_anew = True
    return f"the projector is re-initialised: that of {folder} is for the tower's {tower_width} numbers, the embeddings have {width}"
