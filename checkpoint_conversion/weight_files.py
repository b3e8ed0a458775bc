"""Which of a Hugging Face folder's files are its weights, by transformers' rule (modeling_utils, local folders):

what config.json names as transformers_weights, else model.safetensors, else the index of several, else pytorch_model.bin, else
its index. A folder may hold the weights twice, or others: variants (model.fp16.safetensors), consolidated.* and original/.
They are not read, and named.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rsa_megatron.models.hf_files import read_json_if_there

#: The export's own, beside the model's files (models/trained_files.py); transformers does not read it.
NEWLINE_FILE = "image_newline.safetensors"
_INDEX = ".index.json"
_NAMES = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)
_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.bin",
    "*.bin.index*.json",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
)
_SUBFOLDERS = ("original", "consolidated")
#: What a trainer leaves beside weights.
_NO_WEIGHTS = ("training_args.bin",)


@dataclass(frozen=True)
class WeightFiles:
    """The files of a folder's weights, and the names of other weights in it."""

    chosen: list[Path]
    not_read: list[str]

    def describe_chosen(self) -> str:
        return _shorten([file.name for file in self.chosen])

    def describe_others(self) -> str:
        return _shorten(self.not_read)


def find_weight_files(folder: Path) -> WeightFiles:
    """Find the files that transformers would take.

    Raises:
        ValueError: there are none, an index is broken or names files that are missing, or an adapter lies beside them.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"{adapter}: an adapter lies in the folder, which transformers would add to the weights: merge it (peft's "
            "merge_and_unload, then save_pretrained), or move it to another folder"
        )
    named = read_json_if_there(folder / "config.json").get("transformers_weights")
    names = _NAMES if named is None else (_check_name(named, folder / "config.json"),)
    name = next((name for name in names if (folder / name).is_file()), None)
    there = _list_weights(folder)
    if name is None:
        found = f"; it holds {_shorten(there)}, which transformers does not take by itself" if there else ""
        raise ValueError(f"{folder}: none of {', '.join(names)} found{found}")
    chosen = _read_index(folder / name) if name.endswith(_INDEX) else [folder / name]
    if (folder / NEWLINE_FILE).is_file():
        chosen.append(folder / NEWLINE_FILE)
    taken = {name, *(file.name for file in chosen)}
    return WeightFiles(chosen, [other for other in there if other not in taken])


def _check_name(name, where: Path) -> str:
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors" + _INDEX))
    ):
        raise ValueError(
            f"{where}: transformers_weights is {name!r}; it must be a safetensors file or index in the folder"
        )
    return name


def _read_index(index: Path) -> list[Path]:
    folder = index.parent
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of tensors and files ({error!r}); download it again") from error
    if not names:
        raise ValueError(f"{index} lists no tensor; download it again")
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index} lists files outside its folder; they are not read")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / missing[0]} is missing, which {index.name} lists; download the folder again")
    return [folder / name for name in names]


def _list_weights(folder: Path) -> list[str]:
    """List the names of what looks like weights, files before folders."""
    files = {file.name for pattern in _PATTERNS for file in folder.glob(pattern)} - {*_NO_WEIGHTS, NEWLINE_FILE}
    return sorted(files) + [f"{name}/" for name in _SUBFOLDERS if (folder / name).is_dir()]


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
