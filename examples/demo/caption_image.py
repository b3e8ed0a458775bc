"""Caption a held-out scene with transformers, by a model that was exported to Hugging Face, beside the true caption.

    python examples/demo/caption_image.py --hf demo/stage1/exported --data demo/data/captions

Nothing here knows of what stage the model is: the export's own processor, chat template and end of generation fit its training.
"""

import argparse
import io
import json
from pathlib import Path

import torch
import webdataset
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor


def main():
    args = parse()
    model = AutoModelForImageTextToText.from_pretrained(args.hf, dtype=torch.float32)
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
    """The model's caption."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
