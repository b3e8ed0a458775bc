"""Small random models of the kinds that are measured, in Hugging Face format, with tokenizer and processor; no network.

Widths are no powers of two, numbers of layers differ between the two sides, and weights are drawn so large that a
token more or less in a mean is seen in the first digits.
"""

from pathlib import Path

import numpy
import torch
import transformers
from PIL import Image
from tokenizers import processors

from rsa_megatron.data.synthetic.tokenizer import train_tokenizer
from rsa_megatron.models.trained_files import Training, fit_to_training
from tests.support import tiny_hf

CAPTIONS = [
    "A red boat on the sea.",
    "Two dogs, one of them asleep on a sofa beside a lamp, and a cat that watches both.",
    "A man.",
    "The kitchen has a blue table, four chairs and a window with a view of the hills.",
    "Green apples in a bowl",
    "A train leaves the station in the rain, its lights on, while nobody waits on the platform.",
]
TEXT = dict(
    vocab_size=1064,
    hidden_size=48,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=2,
)
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def picture(number: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """A picture of (width, height) `size`: a ramp of colours with noise, so that layers see more than grey."""
    generator = numpy.random.default_rng(number)
    corners = generator.integers(0, 256, (2, 2, 3), dtype=numpy.uint8)
    ramp = Image.fromarray(corners, "RGB").resize(size, Image.Resampling.BILINEAR)
    noise = generator.integers(-30, 31, (size[1], size[0], 3))
    return Image.fromarray(numpy.clip(numpy.asarray(ramp) + noise, 0, 255).astype(numpy.uint8), "RGB")


def pictures(count: int) -> list[Image.Image]:
    """Pictures of several shapes: wide, tall, square, smaller than a tile."""
    sizes = [(90, 60), (60, 90), (120, 113), (40, 40), (150, 70)]
    return [picture(number, sizes[number % len(sizes)]) for number in range(count)]


def llava_onevision(folder: Path) -> Path:
    """3 layers of 36 and 4 layers of 60; tiles of 58 pixels, 16 tokens each."""
    tokenizer = folder.with_name(folder.name + "-tokenizer")
    train_tokenizer(CAPTIONS, tokenizer)
    return tiny_hf.write(folder, tokenizer, tied=False)


def llava(folder: Path) -> Path:
    """The same as it is exported of stage 1: one tile an image, in transformers' class for that."""
    llava_onevision(folder)
    fit_to_training(folder, tiny_hf.architecture(tied=False), Training("1", "plain", "square"))
    return folder


def internvl(folder: Path) -> Path:
    """3 layers of 24 with a class token and 2 layers of 48; tiles of 56 pixels, 16 tokens, 4 after pixel shuffle."""
    tokenizer = train_tokenizer(CAPTIONS, folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(INTERNVL_TOKENS.values())})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=INTERNVL_TOKENS,
    )
    config = transformers.InternVLConfig(
        vision_config=dict(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=28,
            image_size=[56, 56],
            patch_size=[14, 14],
        ),
        text_config=dict(model_type="qwen2", **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    save(transformers.InternVLForConditionalGeneration, config, folder)
    image_processor = transformers.GotOcr2ImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4
    )
    processor = transformers.InternVLProcessor(
        image_processor,
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )
    processor.save_pretrained(folder)
    return folder


def qwen2_5_vl(folder: Path) -> Path:
    """4 layers of 32, windowed but for the third, and 2 layers of 48; images of up to 100 patches, as large as they are."""
    tokenizer = train_tokenizer(CAPTIONS, folder)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS})
    ids = tokenizer.convert_tokens_to_ids(QWEN_TOKENS)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=4,
            hidden_size=32,
            intermediate_size=28,
            num_heads=4,
            out_hidden_size=48,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[2],
        ),
        text_config=TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])),
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
        tie_word_embeddings=False,
    )
    save(transformers.Qwen2_5_VLForConditionalGeneration, config, folder)
    pixels = dict(patch_size=14, min_pixels=56 * 56, max_pixels=140 * 140)
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**pixels), tokenizer, transformers.Qwen2VLVideoProcessor(**pixels)
    )
    processor.save_pretrained(folder)
    return folder


def save(model_class: type, config, folder: Path) -> None:
    """A model of random weights, the same each time."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape)
            if parameter.ndim >= 2 and "embed_tokens" not in name and "position" not in name and "cls" not in name:
                values /= parameter[0].numel() ** 0.5
            elif "norm" in name or "lambda" in name:
                values = 0.3 * values + 1
            parameter.copy_(values)
    model.save_pretrained(folder)


def roberta(folder: Path) -> Path:
    """The same with 66 positions, of which RoBERTa's count begins after its padding token's, at 2."""
    bert(folder)
    config = transformers.RobertaConfig(
        vocab_size=1064,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=28,
        max_position_embeddings=66,
    )
    save(transformers.RobertaModel, config, folder)
    return folder


def bert(folder: Path) -> Path:
    """An encoder of 2 layers of 36 that sees 64 tokens at most; its tokenizer adds [CLS] and [SEP]."""
    tokenizer = train_tokenizer(CAPTIONS, folder)
    rust = tokenizer.backend_tokenizer
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    rust.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=added)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, cls_token="[CLS]", sep_token="[SEP]", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=1064,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=28,
        max_position_embeddings=64,
    )
    save(transformers.BertModel, config, folder)
    return folder


def tower(name: str, folder: Path) -> Path:
    """A tower of 3 layers of 36 for itself, or with its text tower; 16 patches of 14 pixels."""
    sizes = dict(
        hidden_size=36, num_hidden_layers=3, num_attention_heads=4, intermediate_size=28, image_size=56, patch_size=14
    )
    side = {"size": {"height": 56, "width": 56}}
    make, config, image_processor = {
        "siglip": (
            transformers.SiglipModel,
            _two_towers(transformers.SiglipConfig, sizes),
            transformers.SiglipImageProcessor,
        ),
        "clip": (transformers.CLIPModel, _two_towers(transformers.CLIPConfig, sizes), transformers.CLIPImageProcessor),
        "vit": (transformers.ViTModel, transformers.ViTConfig(**sizes), transformers.ViTImageProcessor),
        "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**sizes), transformers.ViTImageProcessor),
        "dinov2_with_registers": (
            transformers.Dinov2WithRegistersModel,
            transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4),
            transformers.ViTImageProcessor,
        ),
    }[name]
    save(make, config, folder)
    image_processor(**side, crop_size=side["size"]).save_pretrained(folder)
    return folder


def _two_towers(config_class: type, sizes: dict):
    text = dict(hidden_size=36, num_hidden_layers=1, num_attention_heads=4, intermediate_size=28, vocab_size=99)
    return config_class(text_config=text, vision_config=sizes)
