"""Shards of any parts, as other recipes write them, with a dataset.yaml of the caller's."""

import io
import tarfile
from pathlib import Path

import yaml
from megatron.energon import WorkerConfig

from rsa_megatron.data.loaders import ValidationLoader
from rsa_megatron.data.prepare.shard_writer import index_shards


def write(folder: Path, samples: dict[str, dict[str, bytes]], settings: dict | None = None) -> Path:
    """Write the samples, files by name of each, as both splits of a data set; in train their keys begin with "train-"."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
            for key, parts in samples.items():
                for name, content in parts.items():
                    member = tarfile.TarInfo(f"{'train-' * (split == 'train')}{key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_shards(folder, subflavors={}, num_workers=1)
    settings = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"} | (settings or {})
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(settings))
    return folder


def read(folder: Path, encoder, count: int) -> dict[str, tuple[int, str]]:
    """What training reads of the split val: of each key the number of its tiles and the text that it learns."""
    loader = ValidationLoader(str(folder), encoder, WorkerConfig(rank=0, world_size=1, num_workers=0), 1)
    found = {}
    for batch in (next(loader) for _ in range(count)):
        targets = batch.labels[0][batch.loss_mask[0] > 0]
        text = encoder.tokenizer.decode(targets.tolist(), skip_special_tokens=True).strip()
        found[batch.keys[0]] = (int(batch.rsa.num_tiles[0]), text)
    return found
