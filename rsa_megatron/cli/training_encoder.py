"""The task encoder that would train on the data, from --model, --stage and what overrides their settings."""

from pathlib import Path
from typing import TYPE_CHECKING

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.data import conversation
from rsa_megatron.data.image_embeddings import ImageEmbeddings
from rsa_megatron.data.packed_task_encoder import PackingTaskEncoder
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from rsa_megatron.data.tiles import ASPECT_RATIOS, ImageTiler
from rsa_megatron.models.folder_kinds import find_run
from rsa_megatron.models.hf_config import find_architecture
from rsa_megatron.planning.most_tiles import count_row_tiles
from rsa_megatron.recipes import STAGES, recipe

if TYPE_CHECKING:  # only for annotations: importing it takes a second
    from transformers import PreTrainedTokenizerBase


def add_encoder_arguments(parser) -> None:
    parser.add_argument(
        "--model",
        default="llava-ov-7b",
        help="architecture, or a Hugging Face folder, whose tiles and recipe count; default: %(default)s",
    )
    parser.add_argument("--stage", choices=list(STAGES), default="1", help="use the settings of this stage's recipe")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder; default: that of --model")
    parser.add_argument("--template", choices=conversation.TEMPLATES, help="instead of the stage's")
    parser.add_argument("--label-style", choices=conversation.LABEL_STYLES, help="instead of the stage's")
    parser.add_argument("--image-aspect-ratio", choices=ASPECT_RATIOS, help="instead of the stage's")
    parser.add_argument("--image-size", type=int, help="side of a tile, pixels, instead of the model's")


def add_row_arguments(parser) -> None:
    """Add those that say how rows are packed, under the names that training has for them."""
    parser.add_argument("--packing-buffer-size", type=int, default=1000, help="samples; default: %(default)s")
    parser.add_argument("--packing-max-tiles", type=int, help="of a row; default: as training's")
    parser.add_argument(
        "--rsa-text-source", choices=("sequence", "caption"), default="sequence", help="caption: with captions' copies"
    )


class EncoderSettings:
    """What the flags of `add_encoder_arguments` say.

    Raises:
        ValueError: there is no such model or tokenizer, or the tokenizer lacks what the template needs.
    """

    def __init__(self, args):
        self.recipe = recipe(args.model, args.stage)
        for name in ("template", "label_style", "image_aspect_ratio"):
            self.recipe[name] = getattr(args, name) or self.recipe[name]
        self.architecture = find_architecture(args.model)
        self.tile = args.image_size or self.architecture.vision.image_size
        self.tokenizer = load_tokenizer(find_tokenizer(args))
        conversation.check_tokenizer(self.tokenizer, self.recipe["template"])
        grids = self.recipe.get("image_grids")
        if not grids:
            own = self.architecture.vision.image_size
            grids = [(height // own, width // own) for height, width in self.architecture.grid_pinpoints]
        self.grid_pinpoints = [(rows * self.tile, columns * self.tile) for rows, columns in grids]

    def make_image_reader(self, has_pixels: bool = True) -> ImageTiler | ImageEmbeddings:
        """Make the stage's image reader; samples with only embeddings can be read in any stage."""
        positions = self.recipe.get("image_positions", 0)
        if positions or not has_pixels:
            return ImageEmbeddings(width=None, positions=positions or 1)
        return ImageTiler(
            image_size=self.tile,
            image_aspect_ratio=self.recipe["image_aspect_ratio"],
            grid_pinpoints=self.grid_pinpoints,
        )

    def make_encoder(self, reader: ImageTiler | ImageEmbeddings | None = None) -> LlavaTaskEncoder:
        return LlavaTaskEncoder(**self._get_arguments(reader))

    def count_max_tiles(self, row_length: int) -> int:
        """Return the default of --packing-max-tiles."""
        return count_row_tiles(self.recipe | {"seq_length": row_length}, self.architecture).default

    def make_packing_encoder(
        self, row_length: int, max_tiles: int, *, copies_captions: bool = False, truncates: bool = True
    ) -> PackingTaskEncoder:
        """Make the one that packs rows; what it skips it counts, and does not print.

        Args:
            truncates: whether a sample has at most the model's positions, as in training, where the row may be longer.
        """
        longest = min(row_length, self.architecture.decoder.max_position_embeddings) if truncates else row_length
        return PackingTaskEncoder(
            **self._get_arguments() | {"max_sequence_length": longest, "say_skipped": False},
            row_length=row_length,
            max_tiles_per_row=max_tiles,
            copies_captions=copies_captions,
        )

    def count_image_tokens(self, layout: ImageLayout) -> int:
        return layout.num_tokens(self.tile // self.architecture.vision.patch_size, self.architecture.max_tiles)

    def _get_arguments(self, reader: ImageTiler | ImageEmbeddings | None = None) -> dict:
        reader = reader or self.make_image_reader()
        return dict(
            tokenizer=self.tokenizer,
            image_size=self.tile,
            patch_size=self.architecture.vision.patch_size,
            max_sequence_length=self.recipe["seq_length"],
            template=self.recipe["template"],
            label_style=self.recipe["label_style"],
            image_aspect_ratio=self.recipe["image_aspect_ratio"],
            grid_pinpoints=self.grid_pinpoints,
            max_tiles=self.architecture.max_tiles,
            embeddings=None if isinstance(reader, ImageTiler) else reader,
        )


def find_tokenizer(args) -> Path:
    """Find the folder of the tokenizer: --tokenizer, or --model where that has one."""
    if args.tokenizer:
        return args.tokenizer
    if (Path(args.model) / "tokenizer_config.json").is_file():
        return Path(args.model)
    raise ValueError("--tokenizer is missing: name a folder with a tokenizer in Hugging Face format")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    if not folder.is_dir():
        raise ValueError(f"--tokenizer {folder} is not a folder; name one with a Hugging Face tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        run = find_run(folder)
        if run and (run / "hf").is_dir():
            raise ValueError(f"--tokenizer {folder} is a Megatron checkpoint: name {run / 'hf'}") from error
        raise ValueError(f"--tokenizer {folder} has no tokenizer that can be loaded: {error}") from error
