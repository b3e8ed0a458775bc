"""A dual encoder's embeddings are what transformers' own get_image_features and get_text_features give, one at a time."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.evaluation import dual_encoders
from rsa_megatron.evaluation.dual_encoders import EMBEDDING, ImageEmbedder, TextEmbedder
from rsa_megatron.evaluation.hf_models import HFModel
from tests.support import tiny_backbones, tiny_dual_encoders

KINDS = ["clip", "clip_with_its_own_tokenizer", "siglip", "siglip2", "siglip2_of_one_size"]
# Numbers of size 1 after some tens of operations, each rounded to 6e-8; a batch is multiplied in another order than a
# sample alone. A wrong pooling moves them by 0.1 and more (test_another_pooling_is_seen).
TOLERANCE = 1e-5
PAIRS = [
    CaptionedImage(f"{n}", caption, lambda image=image: image)
    for n, (caption, image) in enumerate(zip(tiny_backbones.CAPTIONS, tiny_backbones.pictures(6)))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: getattr(tiny_dual_encoders, kind)(root / kind) for kind in KINDS}


def open_model(folder) -> HFModel:
    return HFModel(str(folder), device=torch.device("cpu"), dtype=torch.float32)


def embeddings(backbone, pairs=PAIRS) -> torch.Tensor:
    return backbone.features([backbone.prepare(pair) for pair in pairs])[EMBEDDING]


def reference(folder):
    """transformers' own model, tokenizer and processor."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return (
        model,
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_are_longer_than_the_model_reads_are_counted(folders, kind):
    backbone = TextEmbedder(open_model(folders[kind]))
    for caption in ("a", "a boat " * tiny_dual_encoders.LONGEST, "b"):
        backbone.prepare(CaptionedImage("x", caption, lambda: None))
    assert backbone.num_truncated == 1


@torch.no_grad()
def images_by_hand(folder) -> torch.Tensor:
    model, _, processor = reference(folder)
    return torch.cat(
        [model.get_image_features(**processor([pair.image()], return_tensors="pt")).pooler_output for pair in PAIRS]
    )


def text_inputs(folder, tokenizer, caption):
    longest = {"truncation": True, "max_length": tiny_dual_encoders.LONGEST, "return_tensors": "pt"}
    if folder.name.startswith("clip"):
        return tokenizer([caption], **longest)
    if folder.name == "siglip2_of_one_size":  # "Model was trained with lowercased text"
        caption = caption.lower()
    # As the model cards say: SigLIP was trained with padding="max_length", which it saw: no mask.
    return {"input_ids": tokenizer([caption], padding="max_length", **longest)["input_ids"]}


@torch.no_grad()
def texts_by_hand(folder) -> torch.Tensor:
    model, tokenizer, _ = reference(folder)
    return torch.cat(
        [model.get_text_features(**text_inputs(folder, tokenizer, pair.caption)).pooler_output for pair in PAIRS]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_transformers_own(kind, folders):
    images, texts = ImageEmbedder(open_model(folders[kind])), TextEmbedder(open_model(folders[kind]))
    for backbone, expected_ND in ((images, images_by_hand(folders[kind])), (texts, texts_by_hand(folders[kind]))):
        actual_ND = embeddings(backbone)
        assert actual_ND.dtype == torch.float32 and backbone.layers == [EMBEDDING]
        torch.testing.assert_close(actual_ND, expected_ND, atol=TOLERANCE, rtol=TOLERANCE)
        assert not torch.allclose(actual_ND, expected_ND.roll(1, 0), atol=0.05)  # each is its own
        alone_ND = torch.cat([embeddings(backbone, [pair]) for pair in PAIRS])
        torch.testing.assert_close(actual_ND, alone_ND, atol=TOLERANCE, rtol=TOLERANCE)
    assert (images.side, texts.side) == ("vision", "text")
    case = "in lower case, " * (kind == "siglip2_of_one_size")
    assert (
        images.identity.keys() >= {"model", "revision", "dtype", "pooling"}
        and texts.identity["text"] == f"{case}its first 12 tokens"
    )
    assert len(tiny_backbones.CAPTIONS[1].split()) > tiny_dual_encoders.LONGEST  # one was cut


@pytest.mark.parametrize("kind", KINDS)
def test_another_pooling_is_seen(kind, folders):
    """Negative control: the last token of a CLIP text that is not cut, the last but one of SigLIP's; a mean over the image."""
    model, tokenizer, processor = reference(folders[kind])
    with torch.no_grad():
        inputs = text_inputs(folders[kind], tokenizer, PAIRS[2].caption)
        states_SD = model.text_model(**inputs).last_hidden_state[0]
        head = model.text_projection if kind.startswith("clip") else model.text_model.head
        other_D = head(states_SD[-2])
        patches_TD = model.vision_model(**processor([PAIRS[2].image()], return_tensors="pt")).last_hidden_state[0]
        mean_D = model.visual_projection(patches_TD.mean(0)) if kind.startswith("clip") else patches_TD.mean(0)
    assert (embeddings(TextEmbedder(open_model(folders[kind])))[2] - other_D).abs().max() > 0.01
    assert (embeddings(ImageEmbedder(open_model(folders[kind])))[2] - mean_D).abs().max() > 0.01


def test_siglips_own_python_tokenizer_is_used_as_it_is(folders, tmp_path):
    """It lower-cases and takes punctuation away, and has no tokenizer.json."""
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(tiny_backbones.CAPTIONS).lower())
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        model_type="unigram",
        minloglevel=2,
    )
    folder = tmp_path / "siglip"
    folder.mkdir()
    for path in folders["siglip"].iterdir():
        if not path.name.startswith(("tokenizer", "special_tokens", "chat")):
            (folder / path.name).write_bytes(path.read_bytes())
    transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=12).save_pretrained(folder)
    model = open_model(folder)
    assert not model.any_tokenizer.is_fast
    backbone = TextEmbedder(model)
    torch.testing.assert_close(embeddings(backbone), texts_by_hand(folder), atol=TOLERANCE, rtol=TOLERANCE)
    same = [CaptionedImage("a", text, None) for text in ("A man.", "a MAN", "a dog")]
    a_D, b_D, c_D = embeddings(backbone, same)
    assert torch.equal(a_D, b_D) and not torch.allclose(a_D, c_D, atol=0.01)
    with pytest.raises(ValueError, match="no token"):
        backbone.prepare(CaptionedImage("a", "...", None))


TEXTS = ["A Man.", "a MAN", "Two DOGS, one of them asleep", "the sea " * 12, "A red boat", "İ Σ of a man"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_of_any_case_and_length_are_read_as_transformers_page_of_the_model_says(kind, folders):
    """All in one call of AutoProcessor: padding as each page has it, SigLIP's up to the last position."""
    model, processor = reference(folders[kind])[0], transformers.AutoProcessor.from_pretrained(folders[kind])
    texts = [text.lower() for text in TEXTS] if kind == "siglip2_of_one_size" else TEXTS
    padding = {"padding": True} if kind.startswith("clip") else {"padding": "max_length"}
    longest = {"truncation": True, "max_length": tiny_dual_encoders.LONGEST}
    inputs = processor(text=texts, return_tensors="pt", **padding, **longest)
    if not kind.startswith("clip"):
        inputs.pop("attention_mask", None)  # the checkpoints' own tokenizer configs leave it out
    expected_ND = model.get_text_features(**inputs).pooler_output
    backbone = TextEmbedder(open_model(folders[kind]))
    actual_ND = embeddings(backbone, [CaptionedImage("a", text, None) for text in TEXTS])
    same = [n for n, text in enumerate(TEXTS) if text.isascii() or kind != "siglip2_of_one_size"]
    torch.testing.assert_close(actual_ND[same], expected_ND[same], atol=TOLERANCE, rtol=TOLERANCE)
    assert backbone.num_truncated >= 1


@pytest.mark.parametrize("kind", ["clip_with_its_own_tokenizer", "siglip2", "siglip2_of_one_size"])
def test_upper_case_changes_nothing_where_models_were_trained_without_it(kind, folders):
    backbone = TextEmbedder(open_model(folders[kind]))
    upper_D, lower_D, other_D = embeddings(
        backbone, [CaptionedImage("a", text, None) for text in ("A MAN", "a man", "a dog")]
    )
    assert torch.equal(upper_D, lower_D) and not torch.allclose(lower_D, other_D, atol=0.01)


def test_without_lower_case_siglip2s_of_one_size_would_be_read_wrongly(folders, monkeypatch):
    """Negative control: as transformers' own processor leaves it to the caller."""
    monkeypatch.setattr(dual_encoders, "_leaves_case", lambda tokenizer: False)
    backbone = TextEmbedder(open_model(folders["siglip2_of_one_size"]))
    upper_D, lower_D = embeddings(backbone, [CaptionedImage("a", text, None) for text in ("A MAN", "a man")])
    assert (upper_D - lower_D).abs().max() > 0.01 and "lower case" not in backbone.identity["text"]


OTHER_FAMILIES = (
    "align altclip blip blip-2 chinese_clip clap clipseg flava groupvit metaclip_2 owlvit owlv2 xclip".split()
)


@pytest.mark.parametrize("kind", [*OTHER_FAMILIES, "vision-text-dual-encoder"])
def test_families_whose_texts_are_prepared_otherwise_are_rejected_in_one_line(kind, tmp_path):
    """Their prompts, padding and pooling are not those above, and nothing is guessed."""
    parts = {name: {"model_type": "clip_vision_model"} for name in ("vision_config",)}
    parts["text_config"] = {"model_type": "bert"}
    content = {"model_type": kind} | (parts if kind == "vision-text-dual-encoder" else {})
    (tmp_path / "config.json").write_text(json.dumps(content))
    for embedder in (ImageEmbedder, TextEmbedder):
        with pytest.raises(ValueError) as error:
            embedder(open_model(tmp_path))
        assert str(error.value).endswith(
            f"model_type {kind} has no embedding of images and texts that can be measured; supported: clip, siglip, siglip2"
        ), error.value


def test_half_precision_runs_and_gives_float32(folders):
    model = HFModel(str(folders["clip"]), device=torch.device("cpu"), dtype=torch.bfloat16)
    images_ND = embeddings(ImageEmbedder(model))
    assert images_ND.dtype == torch.float32
    # bfloat16 keeps 8 bits: a hundredth after some operations.
    cosine_N = torch.nn.functional.cosine_similarity(images_ND, images_by_hand(folders["clip"]))
    assert cosine_N.min() > 0.99


def test_what_has_no_embeddings_is_rejected(folders, tmp_path):
    bert = tiny_backbones.bert(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert has no embedding of images and texts .* clip, siglip"):
        TextEmbedder(open_model(bert))
    copy = tmp_path / "no-eos"
    copy.mkdir()
    for path in folders["clip"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(ValueError, match="which its tokenizer does not append"):
        TextEmbedder(open_model(copy))
    content = json.loads((folders["siglip"] / "config.json").read_text())
    content["vision_config"]["vision_use_head"] = False
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="vision_use_head is false"):
        ImageEmbedder(open_model(copy))


def test_a_head_that_is_missing_is_rejected(folders, tmp_path):
    """The tower alone may lack it (rsa-megatron measure reads layers); the embedding is made by it."""
    copy = tmp_path / "siglip"
    copy.mkdir()
    for path in folders["siglip"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("vision_model.head")}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    assert open_model(copy).tower.layers
    with pytest.raises(ValueError, match="lacks .* weights of a siglip, such as vision_model.head"):
        embeddings(ImageEmbedder(open_model(copy)))
