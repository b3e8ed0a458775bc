"""Both backbones of a Megatron checkpoint, for rsa-megatron measure: on Megatron, in any TP x PP that its flags say.

    torchrun --nproc-per-node 4 -m rsa_megatron measure --checkpoint runs/mine --data DATA --out results/x.jsonl \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

The first rank does all that rsa-megatron measure does. The others serve: they wait for a batch, and take it through their
part of the model with it.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed
from megatron.core.enums import ModelType
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_model
from torch import Tensor

from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.data.tiles import ImageTiler
from rsa_megatron.evaluation.hf_backbones import TOKENIZER_IN_USE, tokenize_caption
from rsa_megatron.evaluation.hf_models import fingerprint
from rsa_megatron.evaluation.megatron_features import (
    Pairs,
    caption_vectors_of_layers,
    image_vectors,
    projected_vectors,
    unwrap_chunks,
)
from rsa_megatron.models.hf_config import find_architecture
from rsa_megatron.models.llava_onevision import PARTS
from rsa_megatron.plugin import RSAPlugin
from rsa_megatron.recipes import stage_1
from rsa_megatron.training import megatron_patches
from rsa_megatron.training.arguments import architecture_of, load_tokenizer, parse
from rsa_megatron.training.providers import model_provider
from rsa_megatron.training.run_folder import TRACKER, run_of

#: The layer of CheckpointProjector.
PROJECTOR = "projector"
_STOP = "stop"


@contextmanager
def checkpoint_backbones(
    checkpoint: Path, megatron_flags: list[str], *, dtype: str, batch_size: int, projected: bool = False
) -> Iterator[list]:
    """Tower and decoder of a checkpoint, on the first rank; the others serve while it is open, and end.

    Args:
        projected: the images after the projector instead of the tower's layers.
    """
    one_process_without_torchrun()
    model = CheckpointModel(checkpoint, megatron_flags, dtype=dtype, batch_size=batch_size, projected=projected)
    if torch.distributed.get_rank() > 0:
        model.serve()
        sys.exit()
    yield [CheckpointProjector(model) if projected else CheckpointVision(model), CheckpointText(model)]
    # Not after an error: the others may be waiting for this rank within a layer. It ends, and torchrun ends them.
    _told(_STOP)


def one_process_without_torchrun() -> None:
    """What torchrun would have set."""
    if "RANK" not in os.environ:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )


class CheckpointModel:
    """This rank's part of a checkpoint's model.

    Args:
        checkpoint: a folder of --save or hf-to-megatron, with its Hugging Face files in hf/.
        megatron_flags: layout and other flags for Megatron.
        dtype: float32 or bfloat16.
        projected: whether `projected_vectors` will be called.

    Raises:
        ValueError: what is wrong with folder or flags.
    """

    def __init__(self, checkpoint: Path, megatron_flags: list[str], *, dtype: str, batch_size: int, projected: bool):
        files = checkpoint / "hf"
        if not (files / "config.json").is_file():
            raise ValueError(
                f"--checkpoint {checkpoint}: hf/config.json is missing; name a folder that --save or hf-to-megatron has written"
            )
        architecture = find_architecture(str(files))
        settings = stage_1() | dict(
            seq_length=min(architecture.decoder.max_position_embeddings, stage_1()["seq_length"]),
            trainable=list(PARTS),
            rsa_weight=0.0,
            train_iters=1,
            eval_iters=0,
            mutual_knn_samples=0,
            micro_batch_size=batch_size,
            global_batch_size=batch_size * int(os.environ.get("WORLD_SIZE", "1")),  # a multiple, whatever the layout
        )
        width = run_of(str(checkpoint)).get("image_embedding_width")
        if width:  # the projector is for embeddings; tower and decoder are as of any other run
            settings |= dict(trainable=["projector"], image_positions=1, image_embedding_width=width)
        if projected and width not in (None, architecture.vision.hidden_size):
            raise ValueError(
                f"--projected: the projector of {checkpoint} takes embeddings of {width} numbers, not the tower's "
                f"tokens of {architecture.vision.hidden_size}; leave it out"
            )
        sys.argv = [
            sys.argv[0],
            "--model",
            str(files),
            "--tokenizer-model",
            str(files),
            "--pretrained-checkpoint",
            str(checkpoint),
            *megatron_flags,
            *(["--bf16"] if dtype == "bfloat16" else []),
        ]
        self.args = parse(RSAPlugin(), settings, reads_data=False)
        if self.args.virtual_pipeline_model_parallel_size:
            raise ValueError("--checkpoint takes pipelines that are not interleaved: leave out the virtual stages")
        if self.args.data_parallel_size > 1:
            raise ValueError(
                f"{self.args.world_size} processes and {self.args.world_size // self.args.data_parallel_size} of TP x PP: start "
                "torchrun with as many processes as the layout has"
            )
        megatron_patches.repair()
        initialize_megatron()
        self.model = get_model(model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
        load_checkpoint(self.model, None, None)
        for chunk in self.model:
            chunk.eval()
        self.chunks = unwrap_chunks(self.model)
        iteration = str(self.args.ckpt_step or (checkpoint / TRACKER).read_text().strip())
        step = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
        self.revision = fingerprint(checkpoint / step)
        self.title = (
            f"{os.path.relpath(checkpoint)}, {f'iteration {iteration}' if iteration.isdecimal() else iteration}"
        )

    def image_vectors(self, images: Tensor, layers: list[int]) -> dict[int, Tensor] | None:
        """v of each layer, where the tower is."""
        first = self.chunks[0]
        return image_vectors(first, images.to(torch.cuda.current_device()), layers) if first.pre_process else None

    def projected_vectors(self, images: Tensor) -> Tensor | None:
        """Each image's vector after the projector, where that is."""
        first = self.chunks[0]
        return projected_vectors(first, images.to(torch.cuda.current_device())) if first.pre_process else None

    def caption_vectors(self, captions: list[Tensor], layers: list[int]) -> dict[int, Tensor]:
        """t of each layer."""
        size = architecture_of(self.args).vision.image_size
        pairs = Pairs.of(torch.zeros(0, 3, size, size), captions, torch.ones(len(captions), dtype=torch.int64))
        return caption_vectors_of_layers(
            self.model, [pairs], layers, micro_batch_size=len(captions), seq_length=self.args.seq_length
        )

    def serve(self) -> None:
        """Serve on every rank but the first: its part of each batch, until asked to stop."""
        while (request := _told(None)) != _STOP:
            name, *arguments = request
            getattr(self, name)(*arguments)


class CheckpointVision:
    """The tower of a checkpoint, as a backbone (rsa_megatron/evaluation/extraction.py)."""

    side = "vision"
    num_truncated = 0

    def __init__(self, model: CheckpointModel):
        vision = architecture_of(model.args).vision
        self._model = model
        self._tiler = ImageTiler(image_size=vision.image_size, image_aspect_ratio="square", grid_pinpoints=[])
        self.layers = [str(number) for number in range(vision.num_layers + 1)]
        self.identity = _identity(model) | {"pooling": "mean of image tokens", "image": "base image"}

    def prepare(self, pair: CaptionedImage) -> Tensor:
        """The whole picture as one tile, [1, 3, height, width]."""
        return self._tiler.tiles([pair.image()])

    def features(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """[n, D] of every layer, float32."""
        _, images, layers = _told(("image_vectors", torch.cat(batch), [int(name) for name in self.layers]))
        return _named(self._model.image_vectors(images, layers))


class CheckpointProjector(CheckpointVision):
    """What a checkpoint's projector makes of an image, as a backbone of one layer; as wide as the decoder's layers."""

    def __init__(self, model: CheckpointModel):
        super().__init__(model)
        self.layers = [PROJECTOR]
        self.identity |= {"image": "base image, after the projector"}

    def features(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """[n, E] float32."""
        _, images = _told(("projected_vectors", torch.cat(batch)))
        return {PROJECTOR: self._model.projected_vectors(images).cpu()}


class CheckpointText:
    """The decoder of a checkpoint, as a backbone; it reads captions alone."""

    side = "text"

    def __init__(self, model: CheckpointModel):
        self._model, self._tokenizer = model, load_tokenizer(model.args)
        self.num_truncated = 0
        self.layers = [str(number) for number in range(model.args.num_layers + 1)]
        self.identity = _identity(model) | {"pooling": "mean of caption tokens", "text_reading": "caption-alone"}

    def prepare(self, pair: CaptionedImage) -> Tensor:
        """The tokens of a pair's caption, cut where --seq-length ends."""
        caption = tokenize_caption(self._tokenizer, pair.caption, self._model.args.seq_length)
        with TOKENIZER_IN_USE:  # from several threads
            self.num_truncated += caption.is_truncated
        return caption.ids[caption.counts]  # Qwen2's tokenizers add nothing

    def features(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """[n, E] of every layer, float32."""
        _, captions, layers = _told(("caption_vectors", batch, [int(name) for name in self.layers]))
        return _named(self._model.caption_vectors(captions, layers))


def _told(request):
    """What the first rank asks for, on every rank."""
    message = [request]
    torch.distributed.broadcast_object_list(message, src=0)
    return message[0]


def _named(vectors: dict[int, Tensor]) -> dict[str, Tensor]:
    return {str(number): rows.cpu() for number, rows in vectors.items()}


def _identity(model: CheckpointModel) -> dict:
    dtype = "bfloat16" if model.args.bf16 else "float32"
    return {"model": model.title, "revision": model.revision, "dtype": dtype}
