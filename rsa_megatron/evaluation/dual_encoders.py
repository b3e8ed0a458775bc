"""The embeddings of transformers' dual encoders (CLIP, SigLIP, SigLIP2): of an image and of a text, in one space.

Two backbones of extraction.py with one layer each, "embedding": what get_image_features and get_text_features give, each
read as the model was trained. An image goes through the model's own processor. A caption is truncated to the model's
positions (CLIP's 77 tokens, SigLIP's 64: of a dense caption that may be the first half). CLIP reads the state of
the end token, before which padding cannot be seen; SigLIP reads that of the last position, and was trained to see the
padding up to there, without a mask, whatever its tokenizer gives. SigLIP 2 was trained on lower case: its own tokenizer class sees
to that, but checkpoints of one image size are called siglip and come with Gemma's, which does not (transformers' page of the model:
"make sure your text labels are preprocessed the same way").

Rows are float32 and not normalised: realign/realign.py does that, in float64.

Shapes: n samples of a batch, S tokens of a text, D width of the embeddings.
"""

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import normalizers
from torch import Tensor

from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.evaluation.hf_backbones import TOKENIZER_IN_USE, describe_model, keep_float32_digits
from rsa_megatron.evaluation.hf_models import HFModel

if TYPE_CHECKING:  # only for annotations
    from transformers import BatchFeature, PreTrainedTokenizerBase

#: The name of the one layer.
EMBEDDING = "embedding"
# CLIP's configs from before transformers named the right token; such models read the state of the highest token id.
_LEGACY_END_TOKEN = 2
# That of SigLIP 2's own tokenizer class.
_LOWER_CASE = normalizers.Lowercase()


class ImageEmbedder:
    """A dual encoder's embeddings of images.

    Raises:
        ValueError: the model is none.
    """

    side = "vision"
    layers = [EMBEDDING]
    num_truncated = 0

    def __init__(self, model: HFModel):
        model.check_dual_encoder()
        self._model, self._processor = model, model.image_processor
        self.identity = describe_model(model) | {"pooling": EMBEDDING, "image": "as its processor prepares it"}

    def prepare(self, pair: CaptionedImage) -> "BatchFeature":
        """Return the pixels of a pair's image; for SigLIP2 models of any image shape also where its patches lie."""
        return self._processor([pair.image()], return_tensors="pt")

    @torch.inference_mode()
    def features(self, batch: list["BatchFeature"]) -> dict[str, Tensor]:
        """Return [n, D], float32."""
        inputs = {name: torch.cat([item[name] for item in batch]).to(self._model.device) for name in batch[0]}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with keep_float32_digits():
            found = self._model.dual_encoder.get_image_features(**inputs)
        return {EMBEDDING: found.pooler_output.float().cpu()}


class TextEmbedder:
    """A dual encoder's embeddings of captions.

    Raises:
        ValueError: the model is none, or its tokenizer does not end a text as the model needs it.
    """

    side = "text"
    layers = [EMBEDDING]

    def __init__(self, model: HFModel):
        model.check_dual_encoder()
        self._model, self._tokenizer = model, model.any_tokenizer
        self._longest = min(model.config.text_config.max_position_embeddings, self._tokenizer.model_max_length)
        self._is_clip = model.model_type == "clip"
        # Whether it is to be done here: "do_lower_case" in a tokenizer's config says how texts were, not what the tokenizer does.
        self._lower_case = not self._is_clip and _leaves_case(self._tokenizer)
        #: texts so far that were longer than the model reads
        self.num_truncated = 0
        if self._is_clip:
            self._check_end()
        case = "in lower case, " * self._lower_case
        self.identity = describe_model(model) | {
            "pooling": EMBEDDING,
            "text": f"{case}its first {self._longest} tokens",
        }

    def prepare(self, pair: CaptionedImage) -> Any:
        """Tokenize a pair's caption, [1, S], for CLIP with its mask. Raises ValueError where there are no tokens."""
        text = self._tokenize(pair.caption)
        if not set(text["input_ids"][0].tolist()) - set(self._tokenizer.all_special_ids):
            raise ValueError("its caption has no token")
        return text

    @torch.inference_mode()
    def features(self, batch: list[Any]) -> dict[str, Tensor]:
        """Return [n, D], float32."""
        length = max(item["input_ids"].shape[1] for item in batch)
        fillers = {"input_ids": self._tokenizer.pad_token_id or 0, "attention_mask": 0}
        inputs = {
            name: torch.cat([_pad(item[name], length, fillers[name]) for item in batch]).to(self._model.device)
            for name in batch[0]
        }
        with keep_float32_digits():
            found = self._model.dual_encoder.get_text_features(**inputs)
        return {EMBEDDING: found.pooler_output.float().cpu()}

    def _tokenize(self, caption: str) -> dict[str, Tensor]:
        if self._lower_case:
            caption = _LOWER_CASE.normalize_str(caption)
        padding = {} if self._is_clip else {"padding": "max_length", "padding_side": "right"}
        with TOKENIZER_IN_USE:
            found = self._tokenizer(
                [caption],
                truncation=True,
                max_length=self._longest,
                split_special_tokens=True,
                return_tensors="pt",
                **padding,
            )
            # Before the last token, which ends every text: where the row is not full, padding, or another text's length.
            if (ids_S := found["input_ids"][0]).numel() == self._longest and ids_S[-2] != self._tokenizer.pad_token_id:
                self.num_truncated += (
                    len(self._tokenizer([caption], split_special_tokens=True)["input_ids"][0]) > self._longest
                )
        names = ("input_ids", "attention_mask") if self._is_clip else ("input_ids",)
        return {name: found[name] for name in names}

    def _check_end(self) -> None:
        end = self._model.config.text_config.eos_token_id
        if end != _LEGACY_END_TOKEN and end not in self._tokenize("a")["input_ids"]:
            raise ValueError(
                f"{self._model.name}: its embedding of a text is the state of token {end}, which its tokenizer does "
                "not append; save it with a tokenizer that adds that token"
            )


def _leaves_case(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether texts must be in lower case and this tokenizer of a SigLIP does not make them so."""
    is_gemma = type(tokenizer).__name__.startswith("Gemma")
    return tokenizer.is_fast and (is_gemma or bool(tokenizer.init_kwargs.get("do_lower_case")))


def _pad(x_1S: Tensor, length: int, filler: int) -> Tensor:
    return torch.nn.functional.pad(x_1S, (0, length - x_1S.shape[1]), value=filler)
