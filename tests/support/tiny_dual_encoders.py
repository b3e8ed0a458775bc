"""Small random dual encoders in Hugging Face format, with tokenizer and processor, saved as the models people have."""

import json
from pathlib import Path

import transformers
from tokenizers import processors

from rsa_megatron.data.synthetic.tokenizer import train_tokenizer
from tests.support.tiny_backbones import CAPTIONS, save

WIDTH = 24
#: Tokens that their texts have at most: less than the longest of CAPTIONS.
LONGEST = 12
_VISION = dict(
    hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28, image_size=56, patch_size=14
)
_TEXT = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=28,
    vocab_size=1064,
    max_position_embeddings=LONGEST,
)


def clip(folder: Path) -> Path:
    """Texts begin with [BOS] and end with [EOS], whose state is their embedding, and are padded with [EOS] as OpenAI's are."""
    bos, eos = _tokenizer(
        folder, "[BOS] $A [EOS]", ["[BOS]", "[EOS]"], pad_token="[EOS]", bos_token="[BOS]", eos_token="[EOS]"
    )
    text = _TEXT | dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=WIDTH)
    save(transformers.CLIPModel, config, folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        folder
    )
    return folder


def clip_with_its_own_tokenizer(folder: Path) -> Path:
    """CLIP with the tokenizer class that OpenAI's come with: lower case, letters and [EOS] as padding."""
    letters = sorted(set("".join(CAPTIONS).lower().replace(" ", "")))
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate([*names[2:], *names[:2]])}
    tokenizer = transformers.CLIPTokenizer(vocabulary, [], model_max_length=LONGEST)
    end = vocabulary["<|endoftext|>"]
    text = _TEXT | dict(bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=WIDTH)
    save(transformers.CLIPModel, config, folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        folder
    )
    return folder


def siglip(folder: Path) -> Path:
    """Texts end with [EOS], which pads them up to the last position, whose state is their embedding."""
    (eos,) = _tokenizer(folder, "$A [EOS]", ["[EOS]"], pad_token="[EOS]", eos_token="[EOS]")
    text = _TEXT | dict(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, projection_size=36)
    config = transformers.SiglipConfig(text_config=text, vision_config=_VISION)
    save(transformers.SiglipModel, config, folder)
    transformers.SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def siglip2(folder: Path) -> Path:
    """For images of any shape: up to 16 patches, and a mask. Its tokens are letters."""
    letters = sorted(set("".join(CAPTIONS).lower().replace(" ", "▁")))
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])
    }
    tokenizer = transformers.Siglip2Tokenizer(vocabulary, [], model_max_length=LONGEST, padding_side="right")
    tokenizer.save_pretrained(folder)
    vision = {name: size for name, size in _VISION.items() if name != "image_size"} | dict(num_patches=16)
    text = _TEXT | dict(bos_token_id=2, eos_token_id=1, pad_token_id=0, projection_size=36)
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    save(transformers.Siglip2Model, config, folder)
    transformers.Siglip2ImageProcessor(patch_size=14, max_num_patches=16).save_pretrained(folder)
    return folder


def siglip2_of_one_size(folder: Path) -> Path:
    """As SigLIP 2 checkpoints of one image size are: type siglip, a Gemma tokenizer that ends texts and keeps upper case, no mask."""
    letters = sorted({"▁", *"".join(CAPTIONS), *"".join(CAPTIONS).upper(), *"".join(CAPTIONS).lower()} - {" "})
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    tokenizer = transformers.GemmaTokenizer({token: number for number, token in enumerate(names)}, [])
    text = _TEXT | dict(bos_token_id=2, eos_token_id=1, pad_token_id=0, projection_size=36)
    config = transformers.SiglipConfig(text_config=text, vision_config=_VISION)
    save(transformers.SiglipModel, config, folder)
    transformers.SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    options = {"processor_class": "SiglipProcessor", "padding_side": "right", "add_bos_token": False}
    options |= {"add_eos_token": True, "do_lower_case": True, "model_input_names": ["input_ids"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder


def _tokenizer(folder: Path, template: str, added: list[str], **options) -> list[int]:
    """Saved to the folder; the ids of what it adds."""
    tokenizer = train_tokenizer(CAPTIONS, folder)
    rust = tokenizer.backend_tokenizer
    rust.add_special_tokens(added)
    ids = [rust.token_to_id(token) for token in added]
    rust.post_processor = processors.TemplateProcessing(single=template, special_tokens=[*zip(added, ids)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, model_max_length=LONGEST, **options).save_pretrained(
        folder
    )
    return ids
