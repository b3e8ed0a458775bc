"""Tiny vision-language models of transformers' classes, and batches of pictures and captions for them; no files, no network.

Layers are of widths that differ between tower and decoder; weights are as large as tests.support.tiny_backbones draws them, so that a token
more or less in a mean is seen in the first digits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from tests.support import tiny_backbones

IMAGE, VIDEO, START, END, PAD = 1060, 1061, 1062, 1063, 0
TEXT = tiny_backbones.TEXT | dict(pad_token_id=PAD)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=False)
GRID_TOKENS = TOKENS | dict(vision_start_token_id=START, vision_end_token_id=END)
SIGLIP = dict(
    hidden_size=36, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
)
SQUARE = {"height": 56, "width": 56}
PINPOINTS = [[56 * rows, 56 * columns] for rows in (1, 2) for columns in (1, 2, 3)]
# Wide, tall, square, smaller than a tile.
_SIZES = [(90, 60), (60, 90), (120, 113), (40, 40), (150, 70)]
PIXELS = dict(min_pixels=56 * 56, max_pixels=140 * 140)


class Sample(NamedTuple):
    #: the numbers of its pictures
    pictures: tuple[int, ...]
    #: the caption's token ids
    caption: tuple[int, ...]
    #: a text before the images, which is no caption
    prompt: tuple[int, ...] = (7, 8, 9)


def samples(count: int, first: int = 0) -> list[Sample]:
    """Each with one picture and a caption of its own length."""
    numbers = range(first, first + count)
    return [Sample((n,), tuple(20 + (7 * n + 3 * k) % 900 for k in range(3 + 2 * n % 5))) for n in numbers]


@dataclass
class TinyModel:
    """A family of models in transformers."""

    name: str
    processor: object

    def build(self):
        torch.manual_seed(0)
        model = _BUILDERS[self.name]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "embed" not in name and "position" not in name and "cls" not in name:
                    parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
                elif "norm" in name or "lambda" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape) + 1)
                else:
                    parameter.copy_(torch.randn(parameter.shape))
        return model

    def pixels(self, numbers: list[int], images_per_sample: list[int] | None = None) -> dict[str, Tensor]:
        """What the processor makes of these pictures."""
        pictures = [tiny_backbones.picture(number, _SIZES[number % len(_SIZES)]) for number in numbers]
        if images_per_sample and self.name == "llava_onevision":
            left = iter(pictures)
            pictures = [[next(left) for _ in range(n)] for n in images_per_sample if n]
        return dict(self.processor(pictures, return_tensors="pt")) if numbers else {}

    def batch(self, model, chosen: list[Sample]) -> dict[str, Tensor]:
        """One row a sample, padded at its end: prompt, images, caption; labels on the caption."""
        numbers = [number for sample in chosen for number in sample.pictures]
        pixels = self.pixels(numbers, [len(sample.pictures) for sample in chosen])
        lengths = iter(self._placeholders(model, pixels) if numbers else [])
        pixels = {name: x for name, x in pixels.items() if name not in ("num_patches", "num_crops")}
        rows, labels = [], []
        for sample in chosen:
            row = list(sample.prompt)
            for _ in sample.pictures:
                row += [START, *[IMAGE] * next(lengths), END]
            labels.append([-100] * len(row) + list(sample.caption))
            rows.append(row + list(sample.caption))
        width = max(map(len, rows))
        padded = lambda lists, value: torch.tensor([x + [value] * (width - len(x)) for x in lists])  # noqa: E731
        batch = dict(input_ids=padded(rows, PAD), labels=padded(labels, -100), **pixels)
        batch["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        kinds = {"gemma3": "token_type_ids"}.get(self.name, "mm_token_type_ids" if self.has_grid else None)
        return batch | ({kinds: (batch["input_ids"] == IMAGE).long()} if kinds else {})

    @property
    def has_grid(self) -> bool:
        return "qwen" in self.name or "glm" in self.name

    @torch.no_grad()
    def _placeholders(self, model, pixels: dict[str, Tensor]) -> list[int]:
        """Rows that each image becomes."""
        if self.name == "internvl":
            return (4 * pixels["num_patches"]).tolist()
        if self.name == "gemma3":
            return [4] * len(pixels["pixel_values"])
        return [len(x) for x in model.get_image_features(**pixels).pooler_output]

    def v_of_one(self, model, number: int, pooling: str = "base") -> Tensor:
        """The mean of what the tower gives for one picture by itself."""
        pixels, inner = self.pixels([number]), model.model
        if self.has_grid:
            found = []
            hook = inner.visual.blocks[-1].register_forward_hook(lambda module, args, output: found.append(output))
            inner.visual(pixels["pixel_values"], pixels["image_grid_thw"])
            hook.remove()
            last = inner.visual.post_layernorm(found[0]) if "glm" in self.name else found[0]
            return last.mean(dim=0)
        tiles = pixels["pixel_values"]
        tiles = tiles[0] if tiles.dim() == 5 else tiles
        base = tiles[-1:] if self.name == "internvl" else tiles[:1]
        output = inner.vision_tower(base if pooling == "base" else tiles, output_hidden_states=True)
        last = output.last_hidden_state
        if "llava" in self.name:  # the layer that the projector reads, LLaVA's last but one
            last = output.hidden_states[model.config.vision_feature_layer]
        if self.name in ("internvl", "llava", "llava_next"):  # the first token is the class token
            last = last[:, 1:]
        return last.mean(dim=(0, 1))

    def t_of_one(self, model, sample: Sample) -> Tensor:
        batch = self.batch(model, [sample])
        del batch["labels"]
        return model.model(**batch).last_hidden_state[0, -len(sample.caption) :].mean(dim=0)


_QWEN_TOWER = dict(depth=4, hidden_size=32, intermediate_size=28, num_heads=4, out_hidden_size=48)


def _conditional(name: str, vision: dict, text: dict, **others):
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **others)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


_BUILDERS = {
    "llava_onevision": lambda: _conditional(
        "LlavaOnevision",
        dict(model_type="siglip_vision_model", vision_use_head=False, **SIGLIP),
        dict(model_type="qwen2", **TEXT),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        **TOKENS,
    ),
    "llava_next": lambda: _conditional(
        "LlavaNext",
        dict(model_type="clip_vision_model", **SIGLIP),
        dict(model_type="qwen2", **TEXT),
        image_grid_pinpoints=PINPOINTS,
        **{name: value for name, value in TOKENS.items() if name != "video_token_id"},
    ),
    "llava": lambda: _conditional(
        "Llava",
        dict(model_type="clip_vision_model", **SIGLIP),
        dict(model_type="qwen2", **TEXT),
        **{name: value for name, value in TOKENS.items() if name != "video_token_id"},
    ),
    "internvl": lambda: _conditional(
        "InternVL",
        dict(SIGLIP, hidden_size=24, image_size=[56, 56], patch_size=[14, 14]),
        dict(model_type="qwen2", **TEXT),
        image_seq_length=4,
        **{name: value for name, value in TOKENS.items() if name != "video_token_id"},
    ),
    "gemma3": lambda: _conditional(
        "Gemma3",
        dict(model_type="siglip_vision_model", vision_use_head=False, **SIGLIP),
        dict(TEXT, head_dim=8),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "qwen2_vl": lambda: _conditional(
        "Qwen2VL", dict(depth=3, embed_dim=32, num_heads=4, hidden_size=48, mlp_ratio=2), TEXT | MROPE, **GRID_TOKENS
    ),
    "qwen2_5_vl": lambda: _conditional(
        "Qwen2_5_VL",
        dict(_QWEN_TOWER, patch_size=14, window_size=56, fullatt_block_indexes=[2]),
        TEXT | MROPE,
        **GRID_TOKENS,
    ),
    "qwen3_vl": lambda: _conditional(
        "Qwen3VL",
        dict(_QWEN_TOWER, patch_size=14, num_position_embeddings=64, deepstack_visual_indexes=[1, 2]),
        dict(TEXT, head_dim=8, **MROPE),
        **GRID_TOKENS,
    ),
    "qwen3_vl_moe": lambda: _conditional(
        "Qwen3VLMoe",
        dict(_QWEN_TOWER, patch_size=14, num_position_embeddings=64, deepstack_visual_indexes=[1, 2]),
        dict(TEXT, head_dim=8, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2, **MROPE),
        **GRID_TOKENS,
    ),
    "glm4v_moe": lambda: _conditional(
        "Glm4vMoe",
        dict(_QWEN_TOWER, patch_size=14, image_size=56),
        dict(
            TEXT,
            moe_intermediate_size=20,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            rope_parameters=dict(MROPE["rope_parameters"], partial_rotary_factor=1.0),
        ),
        **TOKENS,
    ),
    "glm4v": lambda: _conditional("Glm4v", dict(_QWEN_TOWER, patch_size=14, image_size=56), TEXT | MROPE, **TOKENS),
}


def tiny(name: str) -> TinyModel:
    if name == "llava_onevision":
        processor = transformers.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    elif name == "llava_next":
        processor = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        )
    elif name == "llava":
        processor = transformers.CLIPImageProcessor(size=SQUARE, crop_size=SQUARE)
    elif name == "internvl":
        processor = transformers.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
    elif name == "gemma3":
        processor = transformers.Gemma3ImageProcessor(size=SQUARE)
    else:
        processor = transformers.Qwen2VLImageProcessor(patch_size=14, **PIXELS)
    return TinyModel(name, processor)
