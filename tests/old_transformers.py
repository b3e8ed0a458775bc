"""Loads an exported model in old versions of transformers, and compares it with the one installed. By hand: it downloads.

    python -m tests.old_transformers 4.45.2 4.49.0 5.0.0

A tiny model goes from Hugging Face to Megatron and back; each version is installed into a folder of its own, in front
of this environment's packages, and loads what came out. Three folders: the source written with the keys that
transformers 4.45 has; the source saved anew by the version installed; and, as negative control, the second without the
rope_theta that the export adds. Prints a table; ends with an error if a version does not read the first two as this one.

What the table shows of the versions themselves: before 4.50 the processor counts tokens with the 9 of anyres_max_9,
whatever the config says (here 4), and loses a row or column of pixels where an image's borders are of odd size; from
5.0 on it prepares images with torchvision, which rounds otherwise than Pillow.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red boat."}]},
]
CONTROL = "control: no rope_theta"
COLUMNS = [
    "transformers",
    "folder",
    "missing",
    "unexpected",
    "rope theta",
    "image mean",
    "logits differ by",
    "pixels differ by",
    "same token ids",
    "same chat text",
]


def main(versions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = export(folder)
        write_expected(folders["4.45's keys"], folder / "expected.pt")
        rows = [
            [version, name, *found] for version in versions for name, found in try_version(version, folders, folder)
        ]
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows))
    wrong = [row[:2] for row in rows if row[1] != CONTROL and not is_same_model(row[2:])]
    if wrong:
        sys.exit(f"not the same model: {wrong}")


def is_same_model(found: list) -> bool:
    """Logits differ by what the order of float32 sums makes."""
    return len(found) == len(COLUMNS) - 2 and found[:3] == [0, 0, "1,000,000"] and float(found[4]) < 1e-5


def export(folder: Path) -> dict[str, Path]:
    """The folders to load, by name."""
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration, __version__

    from checkpoint_conversion.__main__ import main as convert
    from tests.support import demo_data, tiny_hf

    source = tiny_hf.write(folder / "source", demo_data.cached_demo() / "tokenizer", tied=True)
    saved = folder / "saved"
    LlavaOnevisionForConditionalGeneration.from_pretrained(source).save_pretrained(saved)
    AutoProcessor.from_pretrained(source).save_pretrained(saved)
    folders = {}
    for name, hf in (("4.45's keys", source), (f"saved by {__version__}", saved), (CONTROL, saved)):
        convert(["hf-to-megatron", "--hf", str(hf), "--out", str(folder / f"{name}, Megatron")])
        convert(["megatron-to-hf", "--checkpoint", str(folder / f"{name}, Megatron"), "--out", str(folder / name)])
        folders[name] = folder / name
    config = json.loads((folders[CONTROL] / "config.json").read_text())
    del config["text_config"]["rope_theta"]
    (folders[CONTROL] / "config.json").write_text(json.dumps(config))
    return folders


def write_expected(hf: Path, file: Path) -> None:
    """Images, what the installed version prepares of them, and its logits."""
    import numpy
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration

    from checkpoint_conversion.forward_comparison import make_picture
    from tests.support import tiny_hf

    processor, model = tiny_hf.load_processor(hf), LlavaOnevisionForConditionalGeneration.from_pretrained(hf)
    text = processor.apply_chat_template(MESSAGES)
    samples = []
    for size in tiny_hf.IMAGE_SIZES:
        picture = make_picture(*size)
        prepared = processor(images=[picture], text=[text], return_tensors="pt")
        inputs = {key: prepared[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}
        with torch.no_grad():
            logits = model(**inputs).logits
        samples.append({"picture": torch.from_numpy(numpy.array(picture)), "inputs": inputs, "logits": logits})
    torch.save({"text": text, "samples": samples}, file)


def try_version(version: str, folders: dict[str, Path], folder: Path):
    """Name and cells of each folder as that version finds it, or the reason why it does not."""
    packages = folder / version
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), f"transformers=={version}"]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        yield "all", [f"cannot be installed: {last_line(installed.stderr)}"]
        return
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    for name, hf in folders.items():
        command = [sys.executable, __file__, "--in-this-version", str(hf), str(folder / "expected.pt")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        yield (
            name,
            [f"fails: {last_line(result.stderr)}"] if result.returncode else json.loads(last_line(result.stdout)),
        )


def last_line(text: str) -> str:
    return (text.strip() or "no word").splitlines()[-1]


def in_this_version(hf: str, expected_file: str) -> None:
    """Print a row's cells. Runs with the old version in front: imports nothing of this project."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    model, loading = LlavaOnevisionForConditionalGeneration.from_pretrained(hf, output_loading_info=True)
    processor, expected = AutoProcessor.from_pretrained(hf), torch.load(expected_file)
    largest = {"logits": 0.0, "pixels": 0.0}
    same_ids = 0
    for sample in expected["samples"]:
        with torch.no_grad():
            logits = model(**sample["inputs"]).logits
        largest["logits"] = max(largest["logits"], (logits - sample["logits"]).abs().max().item())
        picture = Image.fromarray(sample["picture"].numpy())
        prepared = processor(images=[picture], text=[expected["text"]], return_tensors="pt")
        difference = prepared["pixel_values"] - sample["inputs"]["pixel_values"]
        largest["pixels"] = max(largest["pixels"], difference.abs().max().item())
        same_ids += prepared["input_ids"].tolist() == sample["inputs"]["input_ids"].tolist()
    # 4.45 has one in each layer.
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    theta = frequencies[1].item() ** -len(frequencies)  # the second of n frequencies is theta ** (-1 / n)
    same_text = processor.apply_chat_template(MESSAGES) == expected["text"]
    print(
        json.dumps(
            [
                len(loading["missing_keys"]),
                len(loading["unexpected_keys"]),
                f"{theta:,.0f}",
                processor.image_processor.image_mean[0],
                *(f"{difference:.0e}" for difference in largest.values()),
                f"{same_ids} of {len(expected['samples'])}",
                "yes" if same_text else "no",
            ]
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-this-version"]:
        in_this_version(*sys.argv[2:])
    elif sys.argv[1:]:
        main(sys.argv[1:])
    else:
        sys.exit(__doc__)
