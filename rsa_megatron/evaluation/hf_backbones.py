"""The two sides of transformers' models as backbones: the mean over a sample's tokens after every layer.

An image goes through the tower by itself: whole, at one size. Its tokens count, class tokens do not; they are read as the
layers leave them, before any last norm, pixel shuffle, merger or projector. A caption goes through the language
model by itself. Its own tokens count; what the tokenizer adds (Llama's <s>, BERT's [CLS] and [SEP]; Qwen's adds nothing) is in the
input, as the model was trained with it, and not in the mean. No chat template, and a caption that spells a special token
is text. The last layer of a language model is read after its final norm, as transformers' hidden_states has it.

`CaptionAfterImage` reads the caption in one pass with its image. Then its states have seen the image through attention,
and share neighbours with it for free: 0.7 was measured where the
caption alone gives 0.05. It is here only to show that.

Layers are read by hooks and pooled at once, in float32: no more than one layer's tokens exist at a time.

Shapes: n samples of a batch, T tokens of an image, S of a padded text, D width.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from rsa_megatron.alignment.pairwise_kernel import float32_products
from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.evaluation.hf_models import HFModel, Side, count_class_tokens, count_layers, count_positions

if TYPE_CHECKING:  # only for annotations
    from transformers import BatchFeature, PreTrainedTokenizerBase

TEXT_READINGS = ("caption-alone", "multimodal")
_UNLIMITED = 10**9  # tokenizers without a limit report 10^30
#: Each call sets the options of the Rust tokenizer, which refuses that while another thread is using it.
TOKENIZER_IN_USE = threading.Lock()


def make_text_backbone(model: HFModel, reading: str) -> "TextBackbone":
    """Make the backbone of a model's language model, read in one of TEXT_READINGS."""
    return TextBackbone(model) if reading == "caption-alone" else CaptionAfterImage(model)


class VisionBackbone:
    """The tower of a vision-language model, or a separate one.

    Raises:
        ValueError: the model has none that is supported.
    """

    side = "vision"
    num_truncated = 0

    def __init__(self, model: HFModel):
        self._model, self._config = model, model.tower_config
        self._processor = model.image_processor  # read here: a fault of the model is none of a pair's image
        self._kind = model.model_type if model.model_type == "llava_onevision" else self._config.model_type
        image = {"llava_onevision": "base image", "internvl_vision": "one tile"}.get(
            self._kind, "as its processor prepares it"
        )
        self.layers = _name_tower_layers(model)
        self.identity = describe_model(model) | {"pooling": "mean of image tokens", "image": image}

    def prepare(self, pair: CaptionedImage) -> "BatchFeature":
        """Return the pixels of a pair's image: one tile, or the patches of one image."""
        options = {}
        if self._kind == "llava_onevision":
            # A grid of one tile: the tiles of larger ones would be made for nothing. The base image, the whole picture
            # squashed to a tile, comes before the grid.
            options = {"image_grid_pinpoints": [[self._processor.size["height"], self._processor.size["width"]]]}
        elif self._kind == "internvl_vision":
            options = {"crop_to_patches": False}
        pixels = self._processor([pair.image()], return_tensors="pt", **options)
        if self._kind == "llava_onevision":
            pixels["pixel_values"] = pixels["pixel_values"][:, 0]
        return pixels

    @torch.inference_mode()
    def features(self, batch: list["BatchFeature"]) -> dict[str, Tensor]:
        """Return [n, D] of every layer, float32."""
        pixels = torch.cat([item["pixel_values"] for item in batch]).to(self._model.device, self._model.dtype)
        tower = self._model.tower
        if "image_grid_thw" in batch[0]:  # Qwen's: images of all sizes, one after the other
            grid = torch.cat([item["image_grid_thw"] for item in batch]).to(self._model.device)
            lengths = grid.prod(1).tolist()
            with _pool_layers(tower, lambda x_TD: _average_each(x_TD, lengths)) as found, keep_float32_digits():
                tower.module(pixels, grid_thw=grid)
        else:
            skip = count_class_tokens(self._config)
            with _pool_layers(tower, lambda x_nTD: x_nTD[:, skip:].float().mean(1)) as found, keep_float32_digits():
                tower.module(pixels)
        return {name: found[name].cpu() for name in self.layers}


@dataclass
class Caption:
    """A caption's tokens, and which of them count."""

    #: [S]
    ids: Tensor
    #: [S], False for what the tokenizer has added
    counts: Tensor
    #: whether the text was longer
    is_truncated: bool = False


def tokenize_caption(tokenizer: "PreTrainedTokenizerBase", caption: str, longest: int) -> Caption:
    """Tokenize a caption, to at most `longest` tokens with those that the tokenizer adds; thread-safe.

    Raises:
        ValueError: it has none.
    """
    with TOKENIZER_IN_USE:
        encoded = tokenizer(
            caption, split_special_tokens=True, return_special_tokens_mask=True, truncation=True, max_length=longest
        )
        # Only a text that fills the model may be longer: tokenized again, without the limit.
        is_truncated = (
            len(encoded["input_ids"]) >= longest
            and len(tokenizer(caption, split_special_tokens=True)["input_ids"]) > longest
        )
    counts = ~torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
    if not counts.any():
        raise ValueError("its caption has no token")
    return Caption(torch.tensor(encoded["input_ids"]), counts, is_truncated)


class TextBackbone:
    """The language model of a vision-language model, or a separate one, or an encoder; it reads captions by themselves.

    Raises:
        ValueError: the model has none that is supported.
    """

    side = "text"

    def __init__(self, model: HFModel):
        self._model = model
        self.layers = _name_layers(count_layers(model.text_config))
        self._tokenizer = model.tokenizer
        #: captions so far that were longer than the model reads
        self.num_truncated = 0
        self.identity = describe_model(model) | {"pooling": "mean of caption tokens", "text_reading": "caption-alone"}

    def prepare(self, pair: CaptionedImage) -> Caption:
        """Tokenize a pair's caption, truncated to the model's positions."""
        of_model = count_positions(self._model.text_config) or _UNLIMITED
        longest = min(self._tokenizer.model_max_length, of_model, _UNLIMITED)
        caption = tokenize_caption(self._tokenizer, pair.caption, longest)
        with TOKENIZER_IN_USE:  # from several threads
            self.num_truncated += caption.is_truncated
        return caption

    def features(self, batch: list[Caption]) -> dict[str, Tensor]:
        """Return [n, D] of every layer, float32."""
        return self._average_states(batch, self._model.language_model.module)

    @torch.inference_mode()
    def _average_states(self, captions: list[Caption], module: Module, **inputs: Tensor) -> dict[str, Tensor]:
        """Average the language model's states while `module` runs, which is it or holds it."""
        ids_nS, is_text_nS, counts_nS = (tensor.to(self._model.device) for tensor in _pad(captions))
        language_model, last = self._model.language_model, self.layers[-1]
        with (
            _pool_layers(language_model, lambda x_nSD: _average_where(x_nSD, counts_nS), last=last) as found,
            keep_float32_digits(),
        ):
            module(input_ids=ids_nS, attention_mask=is_text_nS, **inputs)
        return {name: found[name].cpu() for name in self.layers}


class CaptionAfterImage(TextBackbone):
    """The language model of a vision-language model; it reads the caption after its image, as the processor prepares that."""

    def __init__(self, model: HFModel):
        super().__init__(model)
        if not model.is_vision_language:
            raise ValueError(f"{model.name}: --text-reading multimodal needs a vision-language model (--model)")
        self._processor = model.processor
        self.identity = self.identity | {"text_reading": "multimodal", "image": "as its processor prepares it"}

    def prepare(self, pair: CaptionedImage) -> tuple[Caption, "BatchFeature"]:
        """Return the tokens of image and caption, and the model's other inputs."""
        caption, image = super().prepare(pair), pair.image()
        with TOKENIZER_IN_USE:
            inputs = self._processor(text=[self._format_placeholder()], images=[image], return_tensors="pt")
        image_ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask")
        ids = torch.cat([image_ids, caption.ids[caption.counts]])
        counts = torch.arange(len(ids)) >= len(image_ids)
        return Caption(ids, counts), inputs

    def features(self, batch: list[tuple[Caption, "BatchFeature"]]) -> dict[str, Tensor]:
        """Return [n, D] of every layer, float32."""
        captions, inputs = zip(*batch)
        length = max(len(caption.ids) for caption in captions)
        joined = {name: self._join_inputs(name, [item[name] for item in inputs], length) for name in inputs[0]}
        return self._average_states(captions, self._model.module, **joined)

    def _join_inputs(self, name: str, parts: list[Tensor], length: int) -> Tensor:
        """Join one input of several samples, [1, ...] or [patches or tiles, ...] each, to that of a batch."""
        if name == "mm_token_type_ids":  # one a token: 0 for text
            parts = [torch.nn.functional.pad(part, (0, length - part.shape[1])) for part in parts]
        elif (
            name == "pixel_values"
        ):  # LLaVA-OneVision's [1, tiles, 3, height, width]: images have different numbers of tiles
            parts = [part.flatten(0, 1) if part.ndim == 5 else part for part in parts]
            parts = [part.to(self._model.dtype) for part in parts]
        return torch.cat(parts).to(self._model.device)

    def _format_placeholder(self) -> str:
        token = self._processor.image_token
        return f"<|vision_start|>{token}<|vision_end|>" if self._model.model_type == "qwen2_5_vl" else token


def describe_model(model: HFModel) -> dict:
    """Return the model's entries of a backbone's identity."""
    return {"model": model.title, "revision": model.revision, "dtype": str(model.dtype).removeprefix("torch.")}


def _name_layers(count: int) -> list[str]:
    return [str(number) for number in range(count + 1)]


def _name_tower_layers(model: HFModel) -> list[str]:
    """Name layers up to the one that the model's projector reads: LLaVA's -2, say, leaves the last one unused."""
    names = _name_layers(count_layers(model.tower_config))
    used = getattr(model.config, "vision_feature_layer", -1)
    return names[: len(names) + used + 1 if used < 0 else used + 1] if isinstance(used, int) else names


@contextmanager
def _pool_layers(
    side: Side, pool: Callable[[Tensor], Tensor], *, last: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect `pool` of every layer's output in a forward pass, by name, and of the first one's input as "0".

    Args:
        last: the layer in whose place the whole module's output is read, after its final norm.
    """
    found = {}

    def before(module: Module, args: tuple, kwargs: dict) -> None:
        found["0"] = pool(args[0] if args else kwargs["hidden_states"])

    def after(name: str) -> Callable:
        def hook(module: Module, args: tuple, output) -> None:
            found[name] = pool(output if isinstance(output, Tensor) else output[0])

        return hook

    named = [(str(number), layer) for number, layer in enumerate(side.layers, 1) if str(number) != last]
    named += [(last, side.module)] if last else []
    handles = [side.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [module.register_forward_hook(after(name)) for name, module in named]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def keep_float32_digits() -> Iterator[None]:
    """Keep float32's digits on GPUs too: TF32's 10 bits, cuDNN's default for the patches'
    convolution, cost a measured 3e-4 of the features."""
    cudnn = torch.backends.cudnn
    holder, name, exact = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    before = getattr(holder, name)
    setattr(holder, name, exact)
    try:
        with float32_products():
            yield
    finally:
        setattr(holder, name, before)


def _average_each(x_TD: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([tokens.float().mean(0) for tokens in x_TD.split(lengths)])


def _average_where(x_nSD: Tensor, counts_nS: Tensor) -> Tensor:
    counts_nS1 = counts_nS[..., None]
    return x_nSD.float().masked_fill(~counts_nS1, 0).sum(1) / counts_nS1.sum(1)


def _pad(captions: list[Caption]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad tokens at the end; return them, where they are, and which of them count, all [n, S].

    A causal model never looks at what comes after; an encoder has the mask.
    """
    ids_nS = pad_sequence([caption.ids for caption in captions], batch_first=True)
    is_text_nS = pad_sequence([torch.ones_like(caption.ids) for caption in captions], batch_first=True)
    return ids_nS, is_text_nS, pad_sequence([caption.counts for caption in captions], batch_first=True)
