"""Caption a held-out scene with transformers, by a model that was exported to Hugging Face, beside the true caption.

    python examples/demo/caption_image.py --hf demo/stage1/exported --data demo/data/captions

Stage 1 shows the model an image as its base tile alone (--image-aspect-ratio square), so this is what it is shown
here; transformers' processor would add a grid of tiles, which it has never seen. A model of later stages has: anyres.
"""

import argparse
import io
import json
from pathlib import Path

import torch
import webdataset
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaOnevisionForConditionalGeneration


def main():
    args = parse()
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(args.hf, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.hf)
    # As in training: on Pillow. torchvision's, the default, resizes to slightly other pixels.
    processor.image_processor = AutoImageProcessor.from_pretrained(args.hf, backend="pil")
    image, caption = held_out_scene(args.data, args.index)
    print(f"true caption: {caption}")
    inputs = base_tile(model, processor, image) if args.image_aspect_ratio == "square" else tiles(processor, image)
    print(f"transformers: {describe(model, processor, inputs)}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="folder that megatron-to-hf has written")
    parser.add_argument("--data", type=Path, required=True, help="the demo's data set of captions")
    parser.add_argument(
        "--image-aspect-ratio", choices=["square", "anyres"], default="square", help="as it was trained"
    )
    parser.add_argument("--index", type=int, default=0, help="which of the held-out scenes")
    return parser.parse_args()


def held_out_scene(data: Path, index: int) -> tuple[Image.Image, str]:
    """A picture of the validation part and its caption."""
    samples = webdataset.WebDataset([str(shard) for shard in sorted(data.glob("val-*.tar"))], shardshuffle=False)
    for number, sample in enumerate(samples):
        if number == index:
            conversation = json.loads(sample["json"])["conversations"]
            return Image.open(io.BytesIO(sample["png"])).convert("RGB"), conversation[-1]["value"]
    raise SystemExit(f"error: {data} has no held-out scene {index}")


def base_tile(model, processor, image: Image.Image) -> dict:
    """The prompt of stage 1: the tokens of the image, squashed into one tile."""
    base = processor.image_processor([image], return_tensors="pt")["pixel_values"][0, :1]
    with torch.no_grad():
        tokens = model.model.vision_tower(base, output_hidden_states=True).hidden_states[-1]
        return {"inputs_embeds": model.model.multi_modal_projector(tokens)}


def tiles(processor, image: Image.Image) -> dict:
    """The prompt of an image alone, as transformers prepares it."""
    return processor(text="<image>", images=image, return_tensors="pt")


def describe(model, processor, inputs: dict) -> str:
    """The model's caption; in the plain template it ends with the line."""
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=120, do_sample=False, eos_token_id=newline)
    prompt_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return processor.tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
