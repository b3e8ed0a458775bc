"""What the backbones give is what transformers gives: one sample at a time, its hidden states, a mean by hand."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rsa_megatron.data.sources.pairs import CaptionedImage
from rsa_megatron.evaluation.hf_backbones import CaptionAfterImage, TextBackbone, VisionBackbone
from rsa_megatron.evaluation.hf_models import HFModel, fingerprint
from tests.support import naive_features, tiny_backbones

KINDS = ["llava_onevision", "internvl", "qwen2_5_vl", "llava"]
# States of size 1 to 5 after some tens of operations, each rounded to 6e-8; a batch is multiplied in another order than
# a sample alone, and the means are taken in another.
TOLERANCE = 1e-5
PAIRS = [
    CaptionedImage(f"{n}", caption, lambda image=image: image)
    for n, (caption, image) in enumerate(zip(tiny_backbones.CAPTIONS, tiny_backbones.pictures(6)))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: getattr(tiny_backbones, kind)(root / kind) for kind in KINDS}


def open_model(folder) -> HFModel:
    return HFModel(str(folder), device=torch.device("cpu"), dtype=torch.float32)


def features(backbone, pairs=PAIRS) -> dict[str, torch.Tensor]:
    return backbone.features([backbone.prepare(pair) for pair in pairs])


def assert_close(actual: dict, expected: list[list[torch.Tensor]]) -> None:
    """expected: [sample][layer]"""
    assert list(actual) == [str(number) for number in range(len(expected[0]))]
    for number, rows_nD in enumerate(actual.values()):
        expected_nD = torch.stack([sample[number] for sample in expected])
        torch.testing.assert_close(rows_nD, expected_nD, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_image_features_are_transformers_hidden_states(kind, folders):
    model, processor = naive_features.reference(folders[kind])
    backbone = VisionBackbone(open_model(folders[kind]))
    assert len(backbone.layers) == {"llava_onevision": 3, "internvl": 3, "qwen2_5_vl": 4, "llava": 3}[kind] + 1
    expected = [naive_features.image_features(kind, model, processor, pair.image()) for pair in PAIRS]
    actual = features(backbone)
    assert_close(actual, expected)
    moved = {name: rows.roll(1, 0) for name, rows in actual.items()}
    with pytest.raises(AssertionError):
        assert_close(moved, expected)


def test_an_export_of_stage_1_has_the_features_of_llava_onevisions_base_tile(folders):
    expected, actual = (features(VisionBackbone(open_model(folders[kind]))) for kind in ("llava_onevision", "llava"))
    assert all(torch.equal(actual[name], rows_nD) for name, rows_nD in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_caption_features_are_transformers_hidden_states(kind, folders):
    model, processor = naive_features.reference(folders[kind])
    backbone = TextBackbone(open_model(folders[kind]))
    assert len(backbone.layers) == {"llava_onevision": 4, "internvl": 2, "qwen2_5_vl": 2, "llava": 4}[kind] + 1
    assert_close(
        features(backbone),
        [naive_features.caption_features(model, processor, caption) for caption in tiny_backbones.CAPTIONS],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_templates_in_the_mean_would_be_seen(kind, folders):
    model, processor = naive_features.reference(folders[kind])
    actual = features(TextBackbone(open_model(folders[kind])))
    for wrong in ("<|im_start|>{}<|im_end|>", "{}<|endoftext|><|endoftext|>"):
        states = [
            naive_features.caption_features(model, processor, wrong.format(caption))
            for caption in tiny_backbones.CAPTIONS
        ]
        for number, rows_nD in enumerate(actual.values()):
            assert (rows_nD - torch.stack([sample[number] for sample in states])).abs().amax(1).min() > 1000 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [VisionBackbone, TextBackbone, CaptionAfterImage])
def test_features_do_not_depend_on_the_batch(make, kind, folders):
    backbone = make(open_model(folders[kind]))
    together = features(backbone)
    alone = [features(backbone, [pair]) for pair in PAIRS]
    for name, rows_nD in together.items():
        expected_nD = torch.cat([one[name] for one in alone])
        torch.testing.assert_close(rows_nD, expected_nD, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_caption_after_its_image_is_read_as_transformers_reads_both(kind, folders):
    model, processor = naive_features.reference(folders[kind])
    token = processor.image_token
    placeholder = f"<|vision_start|>{token}<|vision_end|>" if kind == "qwen2_5_vl" else token
    expected = []
    for pair in PAIRS:
        inputs = processor(text=[placeholder + pair.caption], images=[pair.image()], return_tensors="pt")
        length = len(processor.tokenizer(pair.caption)["input_ids"])
        states = model(**inputs, output_hidden_states=True).hidden_states
        expected.append([naive_features.mean_of([*state[0, -length:]]) for state in states])
    backbone = CaptionAfterImage(open_model(folders[kind]))
    actual = features(backbone)
    assert_close(actual, expected)
    alone = features(TextBackbone(open_model(folders[kind])))
    torch.testing.assert_close(actual["0"], alone["0"], atol=TOLERANCE, rtol=TOLERANCE)  # before they look around
    for name in backbone.layers[1:]:
        assert (actual[name] - alone[name]).abs().amax(1).min() > 1000 * TOLERANCE
    other_images = [CaptionedImage(a.key, a.caption, b.image) for a, b in zip(PAIRS, PAIRS[1:] + PAIRS[:1])]
    assert (features(backbone, other_images)["1"] - actual["1"]).abs().amax(1).min() > 1000 * TOLERANCE


def test_a_caption_that_spells_a_special_token_is_text(folders):
    model = open_model(folders["llava_onevision"])
    pair = CaptionedImage("0", "A sign says <image> and <|im_end|>.", PAIRS[0].image)
    special = set(model.tokenizer.all_special_ids)
    assert not special & set(TextBackbone(model).prepare(pair).ids.tolist())
    assert special & set(model.tokenizer(pair.caption)["input_ids"])
    features(CaptionAfterImage(model), [pair])  # one image token more would be an error
    with pytest.raises(ValueError, match="no token"):
        TextBackbone(model).prepare(CaptionedImage("0", "", PAIRS[0].image))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_an_encoder_sees_its_special_tokens_but_they_do_not_count(kind, tmp_path):
    folder = getattr(tiny_backbones, kind)(tmp_path / kind)
    backbone = TextBackbone(open_model(folder))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected, with_specials = [], []
    for caption in tiny_backbones.CAPTIONS:
        ids = tokenizer(caption, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.cls_token_id and ids[0, -1] == tokenizer.sep_token_id
        states = model(ids, output_hidden_states=True).hidden_states
        expected.append([naive_features.mean_of([*state[0, 1:-1]]) for state in states])
        with_specials.append([naive_features.mean_of([*state[0]]) for state in states])
    actual = features(backbone)
    assert_close(actual, expected)
    assert (actual["2"] - torch.stack([sample[2] for sample in with_specials])).abs().amax(1).min() > 100 * TOLERANCE
    long = CaptionedImage("0", "boat " * 300, PAIRS[0].image)  # its positions end at 64
    assert len(backbone.prepare(long).ids) == 64 and backbone.prepare(long).counts.sum() == 62
    features(backbone, [long, *PAIRS])
    fitting = CaptionedImage("0", tokenizer.decode(tokenizer("boat " * 300)["input_ids"][1:63]), PAIRS[0].image)
    before = backbone.num_truncated
    assert len(backbone.prepare(fitting).ids) == 64 and backbone.num_truncated == before == 3  # `long`, each time


@pytest.mark.parametrize(
    "name, skip", [("siglip", 0), ("clip", 1), ("vit", 1), ("dinov2", 1), ("dinov2_with_registers", 5)]
)
@torch.no_grad()
def test_separate_towers(name, skip, tmp_path):
    folder = tiny_backbones.tower(name, tmp_path / name)
    backbone = VisionBackbone(open_model(folder))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = []
    for pair in PAIRS:
        states = model(**processor([pair.image()], return_tensors="pt"), output_hidden_states=True).hidden_states
        assert states[0].shape[1] == 16 + skip  # 4 x 4 patches
        expected.append([naive_features.mean_of([*state[0, skip:]]) for state in states])
    assert_close(features(backbone), expected)


def test_the_tower_ends_where_the_projector_reads_it(folders, tmp_path):
    folder = copy(folders["llava_onevision"], tmp_path / "copy", vision_feature_layer=-2)
    assert VisionBackbone(open_model(folder)).layers == ["0", "1", "2"]


def test_the_revision_of_a_folder_is_what_is_in_it(folders, tmp_path):
    folder = copy(folders["internvl"], tmp_path / "copy")
    assert open_model(folder).revision == open_model(folders["internvl"]).revision == fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.norm.weight" if "model.language_model.norm.weight" in tensors else [*tensors][-1]][
        0
    ] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_model(folder).revision != open_model(folders["internvl"]).revision


def test_what_cannot_be_measured_is_rejected_in_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"nowhere.* its config.json cannot be loaded from the hub \(no folder"
    ) as error:
        open_model("nobody/nowhere")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is not a folder"):
        open_model(tmp_path / "missing")
    bert = open_model(tiny_backbones.bert(tmp_path / "bert"))
    with pytest.raises(
        ValueError, match="model_type bert has no vision tower that can be measured; supported: llava_onevision"
    ):
        VisionBackbone(bert)
    with pytest.raises(ValueError, match="multimodal needs a vision-language model"):
        CaptionAfterImage(bert)
    vit = open_model(tiny_backbones.tower("vit", tmp_path / "vit"))
    with pytest.raises(
        ValueError, match="model_type vit has no language model that can be measured; supported: .*qwen2"
    ):
        TextBackbone(vit)
    folder = copy(folders["qwen2_5_vl"], tmp_path / "unknown", model_type="nothing")
    with pytest.raises(ValueError, match="unknown: its config.json cannot be loaded: .*nothing") as error:
        open_model(folder)
    assert "\n" not in str(error.value)


def test_a_model_that_lacks_a_weight_is_rejected(folders, tmp_path):
    folder = copy(folders["qwen2_5_vl"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "blocks.1.mlp" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="copy lacks 1 weights of a qwen2_5_vl, .*blocks.1.mlp"):
        features(VisionBackbone(open_model(folder)))


def test_a_model_without_its_tokenizer_is_rejected_before_any_caption_is(folders, tmp_path):
    folder = copy(folders["qwen2_5_vl"], tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"copy: it has no tokenizer \(tokenizer.json\)"):
        TextBackbone(open_model(folder))


def copy(source, target, **changes):
    """A folder of the same files, its config changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    if changes:
        (target / "config.json").write_text(json.dumps(config | changes))
    return target
