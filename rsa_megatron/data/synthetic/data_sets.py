"""Rendered scenes as Energon data sets, and a tokenizer trained on their captions.

    captions     images with dense captions, for the RSA loss (subflavor rsa: true)
    questions    images with questions and answers
    texts        only texts
    words        wide and tall pictures with a written word, which is asked for

What exists is not made again. A data set appears under its name only when it is whole.
"""

import dataclasses
import functools
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import webdataset
from tqdm import tqdm

from rsa_megatron import atomic
from rsa_megatron.data.prepare.shard_writer import index_shards
from rsa_megatron.data.synthetic import scenes
from rsa_megatron.data.synthetic.tokenizer import train_tokenizer

PROMPT = "<image>\nPlease generate detailed descriptions of the given image."
KINDS = ("captions", "questions", "texts", "words")


@dataclass(frozen=True)
class Sizes:
    """How many scenes each data set has in each split, and how they are drawn and stored."""

    train: int = 8000
    validation: int = 1024
    test: int = 0
    """Of a third split, for figures that no setting was chosen by."""
    image_size: int = 112
    """Side of a picture, pixels."""
    shard_size: int = 500
    """Samples of a tar."""
    seed: int = 0


def write_data_set(folder: Path, kind: str, sizes: Sizes) -> None:
    if folder.exists():
        print(f"{folder} already exists")
        return
    with atomic.new_folder(folder) as unfinished:
        counts = {"train": sizes.train, "val": sizes.validation} | ({"test": sizes.test} if sizes.test else {})
        for split, count in counts.items():
            with webdataset.ShardWriter(
                f"{unfinished}/{split}-%05d.tar", maxcount=sizes.shard_size, verbose=0
            ) as writer:
                for index in tqdm(range(count), desc=f"{folder} {split}", unit="scene", mininterval=1):
                    writer.write(make_sample(kind, index, split, sizes))
        index_data_set(unfinished, kind)


def make_sample(kind: str, index: int, split: str, sizes: Sizes) -> dict:
    """Make a sample as webdataset writes it: LLaVA's conversations, what is in the scene, and the picture."""
    scene = get_scene(kind, index, split, sizes)
    seed = f"{sizes.seed}/{kind}/{split}/{index}"
    if kind == "words" and not scene.word:
        scene = dataclasses.replace(scene, word=scene.theme.words[index % 2])
    record = {"id": f"{kind}-{split}-{index:06d}", "conversations": make_conversations(kind, scene, seed)}
    sample = {"__key__": record["id"]}
    if kind != "texts":
        record["contents"] = scene.contents
        picture = io.BytesIO()
        image = scenes.render(scene, sizes.image_size, seed)
        if kind == "words":  # it stands at the top
            side = sizes.image_size
            image = image.crop((0, 0, side, side // 2) if index % 3 else (side // 4, 0, side - side // 4, side))
        image.save(picture, "PNG")
        sample["png"] = picture.getvalue()
    return sample | {"json": json.dumps(record).encode()}


def get_scene(kind: str, index: int, split: str, sizes: Sizes) -> scenes.Scene:
    """Return a scene. Each data set has its own; those of the test split have a content that is in no other split of any."""
    seed = sizes.seed + KINDS.index(kind)
    if split != "test":
        return scenes.make_scene(seed, index, validation=split == "val")
    candidates = (scenes.make_scene(f"{seed}/test/{number}", index, validation=True) for number in itertools.count())
    return next(
        scene for scene in candidates if get_content(scene) not in get_validation_contents(sizes.seed, sizes.validation)
    )


def get_content(scene: scenes.Scene) -> tuple:
    """Return what training and validation scenes differ in."""
    return scene.theme.name, *sorted((thing.colour, thing.noun) for thing in scene.things)


@functools.cache
def get_validation_contents(seed: int, count: int) -> set[tuple]:
    """Return the contents of all data sets' validation scenes: a setting may be chosen on any of them."""
    numbers = itertools.product(range(len(KINDS)), range(count))
    return {get_content(scenes.make_scene(seed + kind, index, validation=True)) for kind, index in numbers}


def make_conversations(kind: str, scene: scenes.Scene, seed) -> list[dict]:
    if kind == "captions":
        return make_turns([(PROMPT, scenes.write_caption(scene, seed))])
    if kind == "questions":
        (first, *others) = scenes.write_questions(scene, seed)
        return make_turns([("<image>\n" + first[0], first[1]), *others])
    if kind == "words":
        return make_turns([("<image>\nWhich word is written in the picture?", scene.word)])
    return make_turns([(f"Tell me about {scene.theme.name} pictures.", scenes.write_text(scene, seed))])


def make_turns(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair)]


def index_data_set(folder: Path, kind: str) -> None:
    """Write Energon's own index, and the subflavors that the task encoder reads."""
    index_shards(folder, subflavors={"kind": kind, "rsa": kind == "captions"}, num_workers=2)


def write_tokenizer(folder: Path, sizes: Sizes) -> None:
    if folder.exists():
        print(f"{folder} already exists")
        return
    texts = [
        turn["value"]
        for kind in KINDS[:3]  # the words are in the questions too
        for index in tqdm(range(min(sizes.train, 2000)), desc=f"{folder} {kind}", unit="text", mininterval=1)
        for turn in make_conversations(
            kind, scenes.make_scene(sizes.seed + KINDS.index(kind), index, validation=False), index
        )
    ]
    with atomic.new_folder(folder) as unfinished:
        train_tokenizer(texts, unfinished)
    print(f"{folder}: trained on the texts of the data")
