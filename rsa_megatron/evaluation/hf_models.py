"""Models of transformers, by folder or by name on the hub: what they are, where their two sides are, their weights.

Only the config is read until a side is requested: features that are on disk already need no weights. Weights are read
only from safetensors, and every one must be present: a tower of random weights would give figures as well.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import HFValidationError
from torch.nn import Module, ModuleList

if (
    TYPE_CHECKING
):  # only for annotations: transformers takes seconds to import, which a run on stored features is spared
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

#: The vision-language models whose two sides can be measured, and the name of the module of each that is the tower.
VISION_LANGUAGE = {
    "llava_onevision": "vision_tower",
    "internvl": "vision_tower",
    "qwen2_5_vl": "visual",
    "llava": "vision_tower",
}
#: Towers, and how many of their first tokens are not of the image: class, distillation and register tokens.
TOWERS = {
    "siglip_vision_model": 0,
    "internvl_vision": 1,
    "clip_vision_model": 1,
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
}
# Two towers in one model, of which that for images is taken.
_WITH_TEXT_TOWER = ("siglip", "clip")
#: Dual encoders: both towers end in one space, in which images and texts have an embedding each.
DUAL_ENCODERS = ("clip", "siglip", "siglip2")
# RoBERTa and what was made of it: their first position is that after the padding token's id.
_POSITIONS_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text"),
    *("ibert", "longformer", "luke", "mpnet"),
)
# Part of the model's class but not of the way to any layer's output: checkpoints may lack them.
_UNUSED = ("pooler", "head", "cls.", "mask_token")


@dataclass(frozen=True)
class Side:
    """The part of a model that is the tower, or the language model."""

    module: Module
    layers: ModuleList
    config: "PreTrainedConfig"


class HFModel:
    """A model of transformers.

    Args:
        name: a folder, or a name on the hub.
        device: where it runs.
        dtype: of its weights and arithmetic.

    Raises:
        ValueError: neither is there, or transformers does not know its type.
    """

    def __init__(self, name: str, *, device: torch.device, dtype: torch.dtype):
        self.name, self.device, self.dtype = name, device, dtype
        #: for manifests and results: of a folder its own name, without the path to it
        self.title = Path(name).resolve().name if Path(name).is_dir() else name
        self.config = self._read("its config.json", "AutoConfig")
        self.model_type = self.config.model_type

    @property
    def is_vision_language(self) -> bool:
        return self.model_type in VISION_LANGUAGE

    @cached_property
    def revision(self) -> str:
        """The hub's commit; of a folder, a SHA-256 over names and contents of its files."""
        return getattr(self.config, "_commit_hash", None) or fingerprint(Path(self.name))

    @property
    def tower_config(self) -> "PreTrainedConfig":
        """The tower's config. Raises ValueError where no tower can be measured."""
        if self.is_vision_language or self.model_type in _WITH_TEXT_TOWER:
            return self.config.vision_config
        if self.model_type in TOWERS:
            return self.config
        raise self._make_unsupported_error("vision tower", [*VISION_LANGUAGE, *_WITH_TEXT_TOWER, *TOWERS])

    @property
    def text_config(self) -> "PreTrainedConfig":
        """The language model's config. Raises ValueError where none can be measured."""
        if self.is_vision_language:
            return self.config.text_config
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )

        known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MASKED_LM_MAPPING_NAMES}
        if (
            self.model_type in known
            and not self.config.is_encoder_decoder
            and hasattr(self.config, "num_hidden_layers")
        ):
            return self.config
        others = "causal language models and encoders such as gpt2, llama, qwen2, bert, roberta"
        raise self._make_unsupported_error("language model", [*VISION_LANGUAGE, others])

    @cached_property
    def tower(self) -> Side:
        config, module = self.tower_config, self.module
        if self.is_vision_language:
            module = getattr(module, VISION_LANGUAGE[self.model_type])
        elif self.model_type in _WITH_TEXT_TOWER:
            module = module.vision_model
        return Side(module, self._find_layers(module, count_layers(config)), config)

    @cached_property
    def language_model(self) -> Side:
        config, module = self.text_config, self.module
        if self.is_vision_language:
            module = module.language_model
        return Side(module, self._find_layers(module, count_layers(config)), config)

    @cached_property
    def module(self) -> "PreTrainedModel":
        """The whole model without the layer that gives logits, with its weights, for inference."""
        model = self._load(_UNUSED)
        model = model.model if self.is_vision_language else model
        model.config.use_cache = False
        if self.is_vision_language:
            model.language_model.config.use_cache = False
        return self._prepare_for_inference(model)

    @cached_property
    def dual_encoder(self) -> "PreTrainedModel":
        """The whole model, its heads included: what gives embeddings."""
        self.check_dual_encoder()
        return self._prepare_for_inference(self._load(()))

    def check_dual_encoder(self) -> None:
        """Raise ValueError, before weights are read, where images and texts have no embeddings in one space."""
        if self.model_type not in DUAL_ENCODERS:
            raise self._make_unsupported_error("embedding of images and texts", [*DUAL_ENCODERS])
        if not getattr(self.config.vision_config, "vision_use_head", True):
            raise ValueError(
                f"{self.name}: its vision_use_head is false, so its images have no embedding; name a model with the head"
            )

    def _load(self, unused: tuple[str, ...]) -> "PreTrainedModel":
        """Load the model. Raises ValueError where a weight is missing, unless its name has one of `unused` in it."""
        auto_class = "AutoModelForImageTextToText" if self.is_vision_language else "AutoModel"
        model, loaded = self._read(
            "its weights (model.safetensors)",
            auto_class,
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        missing = sorted(name for name in loaded["missing_keys"] if not any(part in name for part in unused))
        if missing:
            raise ValueError(f"{self.name} lacks {len(missing)} weights of a {self.model_type}, such as {missing[0]}")
        return model

    def _prepare_for_inference(self, model: "PreTrainedModel") -> "PreTrainedModel":
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """One of the library tokenizers. Raises ValueError where it is none."""
        if not self.any_tokenizer.is_fast:
            raise ValueError(
                f"{self.name}: its tokenizer is not one of the library tokenizers (tokenizer.json); save it as one"
            )
        return self.any_tokenizer

    @cached_property
    def any_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, also one in Python as SigLIP's, which lower-cases and takes punctuation away."""
        tokenizer = self._read("its tokenizer", "AutoTokenizer")
        if not tokenizer.get_vocab().keys() - set(
            tokenizer.all_special_tokens
        ):  # what transformers makes of no file at all
            raise ValueError(f"{self.name}: it has no tokenizer (tokenizer.json); copy that of its base model")
        return tokenizer

    @cached_property
    def image_processor(self):
        # On Pillow, as training here prepares images: torchvision's filter gives slightly other pixels.
        return self._read("its image processor", "AutoImageProcessor", backend="pil")

    @cached_property
    def processor(self) -> "ProcessorMixin":
        processor = self._read("its processor", "AutoProcessor")
        processor.image_processor = self.image_processor
        return processor

    def _read(self, what: str, auto_class: str, **options):
        import transformers

        if not Path(self.name).is_dir() and (Path(self.name).is_absolute() or self.name.startswith(".")):
            raise ValueError(f"{self.name} is not a folder")
        if hasattr(self, "config"):  # of the same commit, should the name move meanwhile
            options["revision"] = getattr(self.config, "_commit_hash", None)
        try:
            return getattr(transformers, auto_class).from_pretrained(self.name, **options)
        except (OSError, ValueError, KeyError, TypeError, HFValidationError) as error:
            raise ValueError(
                f"{self.name}: {what} cannot be loaded{self._describe_origin()}: {_join_lines(error)}"
            ) from error

    def _describe_origin(self) -> str:
        return "" if Path(self.name).is_dir() else " from the hub (no folder of that name)"

    def _find_layers(self, module: Module, count: int) -> ModuleList:
        for child in module.modules():
            if isinstance(child, ModuleList) and len(child) == count:
                return child
        raise ValueError(f"{self.name}: its model_type {self.model_type} has no list of {count} layers to read")

    def _make_unsupported_error(self, what: str, supported: list[str]) -> ValueError:
        return ValueError(
            f"{self.name}: model_type {self.model_type} has no {what} that can be measured; "
            f"supported: {', '.join(supported)}"
        )


def count_layers(config: "PreTrainedConfig") -> int:
    return config.depth if config.model_type == "qwen2_5_vl_vision" else config.num_hidden_layers


def count_positions(config: "PreTrainedConfig") -> int | None:
    """Count the tokens that a language model can read; None where its config has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _POSITIONS_AFTER_PADDING:
        return positions - config.pad_token_id - 1
    return positions


def count_class_tokens(config: "PreTrainedConfig") -> int:
    """Count the tokens of one of TOWERS before those of the image."""
    return TOWERS[config.model_type] + getattr(config, "num_register_tokens", 0)


def fingerprint(folder: Path) -> str:
    """Hash the files of a folder with SHA-256; subfolders do not count. Some seconds for the 16 GB of a model of 7B."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _join_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
