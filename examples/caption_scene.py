"""Caption a held-out scene with transformers, by a model that was exported to Hugging Face, beside the true caption.

    python examples/caption_scene.py --hf demo/stage1/hf-export --data demo/data/captions
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
    print(f"transformers: {describe(model, processor, image)}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="folder that megatron-to-hf has written")
    parser.add_argument("--data", type=Path, required=True, help="the demo's data set of captions")
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


def describe(model, processor, image: Image.Image) -> str:
    """The model's caption, after stage 1: the prompt is the image alone, and the caption ends with the line."""
    inputs = processor(text="<image>", images=image, return_tensors="pt")
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=100, do_sample=False, eos_token_id=newline)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
