"""Features and mutual-kNN once more, as simply as can be: transformers' own classes, a sample at a time, loops."""

import torch
import transformers


def reference(folder):
    """transformers' own model and processor, on Pillow."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return model.model, processor


def mean_of(rows) -> torch.Tensor:
    total = torch.zeros(rows[0].shape, dtype=torch.float64)
    for row in rows:
        total += row.double()
    return (total / len(rows)).float()


@torch.no_grad()
def image_features(kind, model, processor, image) -> list[torch.Tensor]:
    if kind == "qwen2_5_vl":
        pixels = processor.image_processor([image], return_tensors="pt")
        states = model.visual(
            pixels["pixel_values"], grid_thw=pixels["image_grid_thw"], output_hidden_states=True
        ).hidden_states
        return [mean_of([*state]) for state in states]
    if kind == "llava_onevision":
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"][0, :1]
        skip = 0
    elif kind == "llava":
        pixels, skip = processor.image_processor([image], return_tensors="pt")["pixel_values"], 0
    else:
        side = processor.image_processor.size["height"]
        squashed = image.resize(
            (side, side), transformers.image_utils.PILImageResampling(processor.image_processor.resample)
        )
        pixels = processor.image_processor([squashed], crop_to_patches=False, return_tensors="pt")["pixel_values"]
        skip = 1
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return [mean_of([*state[0, skip:]]) for state in states]


@torch.no_grad()
def caption_features(model, processor, caption) -> list[torch.Tensor]:
    ids = processor.tokenizer(caption, add_special_tokens=False, return_tensors="pt")["input_ids"]
    states = model.language_model(ids, output_hidden_states=True).hidden_states
    return [mean_of([*state[0]]) for state in states]


def mutual_knn(a_ND: torch.Tensor, b_NE: torch.Tensor, k: int) -> float:
    shared = 0
    for row in range(len(a_ND)):
        near = []
        for x in (a_ND.double(), b_NE.double()):
            similarity = torch.nn.functional.cosine_similarity(x[row], x, dim=1)
            similarity[row] = -2
            near.append(set(similarity.argsort(descending=True)[:k].tolist()))
        shared += len(near[0] & near[1])
    return shared / (k * len(a_ND))
