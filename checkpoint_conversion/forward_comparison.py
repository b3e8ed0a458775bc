"""What transformers and Megatron compute of the same samples, output by output.

The samples go the way of training on our side (LlavaTaskEncoder, LlavaOneVision), and the way of serving on the other
(Hugging Face's processor and model). One model at a time is in memory. Local layers, one process, the GPU if
there is one.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from checkpoint_conversion.torch_dist_load import MegatronCheckpoint, find_checkpoint
from checkpoint_conversion.weight_map import table
from rsa_megatron.anyres import ImageLayout
from rsa_megatron.batch import LlavaBatch
from rsa_megatron.data.task_encoder import LlavaTaskEncoder, StoredSample
from rsa_megatron.models.hf_config import read_architecture
from rsa_megatron.models.trained_files import shows_one_tile

_TEXT = "A red boat lies in the harbour."


@dataclass
class Sample:
    """One sample as both models take it."""

    name: str
    images: list[Image.Image]
    #: as it would lie in a shard
    stored: StoredSample
    #: of the training path, one sequence
    batch: LlavaBatch
    #: what transformers' processor makes of the images
    pixels: dict[str, Tensor]
    #: with each image's token as often as the image has tokens, and -100 where there is no target; [1, L]
    input_ids: Tensor
    labels: Tensor


def make_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Make noise on a slope: no two regions of it alike."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(0, 150, height)[:, None, None] + torch.linspace(0, 50, width)[None, :, None]
    return Image.fromarray((slope + 55 * torch.rand(height, width, 3, generator=generator)).byte().numpy())


def make_samples(hf: Path) -> list[Sample]:
    """Make samples of one image, a wide one, a tall one, two images, none."""
    encoder, size = make_encoder(hf), read_architecture(hf).vision.image_size
    shapes = {
        "one image": [(size, size)],
        "a wide image": [(size * 5 // 6, size * 8 // 3)],
        "a tall image": [(size * 5 // 2, size)],
        "two images": [(size, size // 2), (size // 2, size * 2)],
        "no image": [],
    }
    return [
        make_sample(name, [make_picture(*shape, seed) for seed, shape in enumerate(sizes)], encoder, hf)
        for name, sizes in shapes.items()
    ]


def make_encoder(hf: Path) -> LlavaTaskEncoder:
    """Make training's task encoder for the model in a folder."""
    architecture = read_architecture(hf)
    return LlavaTaskEncoder(
        AutoTokenizer.from_pretrained(hf),
        image_size=architecture.vision.image_size,
        patch_size=architecture.vision.patch_size,
        max_sequence_length=architecture.decoder.max_position_embeddings,
        template="qwen_1_5",
        image_aspect_ratio="square" if shows_one_tile(hf) else "anyres",
        grid_pinpoints=architecture.grid_pinpoints,
        max_tiles=architecture.max_tiles,
    )


def make_sample(name: str, images: list[Image.Image], encoder, hf: Path, text: str = _TEXT) -> Sample:
    """Make a sample of these images and a caption, as training does; pixels from transformers' processor."""
    turns = [{"from": "human", "value": "<image>\n" * len(images) + "What is this?"}, {"from": "gpt", "value": text}]
    parts = {f"{index}.png": _as_png(image) for index, image in enumerate(images)}
    record = json.dumps({"conversations": turns}).encode()
    stored = StoredSample(__key__=name, __restore_key__=(), images=parts, record=record)
    batch = encoder.batch([encoder.encode_sample(stored)])
    image_token = encoder.tokenizer.convert_tokens_to_ids("<image>")
    counts = [
        ImageLayout(*row).num_tokens(encoder.tokens_per_side, encoder.max_tiles) for row in batch.image_layouts.tolist()
    ]
    # Inputs are all tokens but the last one; Hugging Face takes the whole sequence and shifts the labels itself.
    tokens = [*batch.tokens[0].tolist(), batch.labels[0, -1].item()]
    is_target = [False, *(batch.loss_mask[0] > 0).tolist()]
    input_ids, labels = [], []
    for token, target in zip(tokens, is_target):
        repeats = counts.pop(0) if token == image_token else 1
        input_ids += [token] * repeats
        labels += [token if target else -100] * repeats
    pixels = {}
    if images:
        # By name: the one on Pillow, which training uses. torchvision's resizes to other pixels.
        processor = AutoImageProcessor.from_pretrained(hf, backend="pil")
        pixels = dict(processor(images if shows_one_tile(hf) else [images], return_tensors="pt"))
    return Sample(name, images, stored, batch, pixels, torch.tensor([input_ids]), torch.tensor([labels]))


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def run_hugging_face(hf: Path, samples: list[Sample], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Compute transformers' outputs, by the names of verify.OUTPUTS, float32 on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(hf, dtype=dtype).to(device).eval()
    results = []
    for sample in samples:
        pixels = {name: tensor.to(device) for name, tensor in sample.pixels.items()}
        parts = {}
        if pixels:
            pixels["pixel_values"] = pixels["pixel_values"].to(dtype)
            tiles = sample.pixels["pixel_values"]
            parts["pixels"] = tiles.reshape(-1, *tiles.shape[-3:])
            features = model.get_image_features(**pixels, output_hidden_states=True)
            parts["vision features"] = features.hidden_states[-1]
            parts["projected tokens"] = torch.cat(features.pooler_output)
        output = model(
            input_ids=sample.input_ids.to(device), labels=sample.labels.to(device), output_hidden_states=True, **pixels
        )
        parts |= {
            "last hidden state": output.hidden_states[-1][0],
            "logits": output.logits[0],
            "loss": output.loss[None],
        }
        results.append({part: tensor.float().cpu() for part, tensor in parts.items()})
    return results


@torch.no_grad()
def run_megatron(hf: Path, checkpoint: Path, samples: list[Sample], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Compute the same of the Megatron model, sample by sample (logits are large), on `one_process`."""
    model = load_model(hf, checkpoint, dtype)
    device = next(model.parameters()).device
    seen = {}
    model.vision_model.register_forward_hook(lambda module, args, output: seen.update({"vision features": output}))
    model.vision_projection.register_forward_hook(
        lambda module, args, output: seen.update({"projected tokens": output[:, 0]})
    )
    model.language_model.decoder.register_forward_hook(
        lambda module, args, output: seen.update({"last hidden state": output[:, 0]})
    )
    for sample in samples:
        seen.clear()
        batch = sample.batch
        # The whole sequence, as Hugging Face has it: the last token, which is only a label, is an input too.
        tokens = torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).to(device)
        inputs = batch.images.to(device, dtype), tokens, None, None
        layouts, no_sound = batch.image_layouts.to(device), torch.zeros(0, device=device)
        logits, _ = model(*inputs, image_layouts=layouts, sound_clips=no_sound)
        parts = dict(seen) | {"logits": logits[0]}
        labels = torch.cat([batch.labels, batch.labels[:, -1:]], dim=1).to(device)
        loss_mask = torch.nn.functional.pad(batch.loss_mask, (0, 1)).to(device)
        token_loss, mask = model(
            *inputs, labels=labels, loss_mask=loss_mask, image_layouts=layouts, sound_clips=no_sound
        )
        parts["loss"] = ((token_loss.float() * mask).sum() / mask.sum())[None]
        if sample.images:
            parts["pixels"] = batch.images
        yield {part: tensor.float().cpu() for part, tensor in parts.items()}


def load_model(hf: Path, checkpoint: Path, dtype: torch.dtype):
    """Load the Megatron model with the checkpoint's weights, on `one_process`.

    Raises:
        ValueError: not a checkpoint, or of another model than the folder's.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from rsa_megatron.models.llava_onevision import LlavaOneVision
    from rsa_megatron.models.transformer_configs import make_local_decoder_config

    architecture = read_architecture(hf)
    folder = find_checkpoint(checkpoint, None)
    # Before Megatron reads it: its reader would run whatever a forged file holds.
    MegatronCheckpoint(folder, table(architecture))
    model = LlavaOneVision(
        architecture,
        make_local_decoder_config(architecture, dtype),
        padded_vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.decoder.max_position_embeddings,
        image_token_index=AutoTokenizer.from_pretrained(hf).convert_tokens_to_ids("<image>"),
        tie_word_embeddings=architecture.decoder.tie_word_embeddings,
        rotary_base=architecture.decoder.rotary_base,
    )
    try:
        state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    except CheckpointingException as error:
        raise ValueError(f"{folder} does not hold the model of {hf}/config.json: {error}") from error
    # Beside the model's tensors `state` has what is common to the checkpoint.
    model.load_state_dict({name: state[name] for name in model.state_dict() if name in state})
    return model.to(torch.cuda.current_device(), dtype).eval()


@contextlib.contextmanager
def one_process():
    """Set up Megatron's process groups for only this process."""
    import torch.distributed
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
