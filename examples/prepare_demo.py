"""Write the demo's data: rendered scenes as Energon data sets, and a tokenizer trained on their captions.

    python examples/prepare_demo.py --out demo

    demo/data/captions     images with dense captions, for the RSA loss (subflavor rsa: true)
    demo/data/questions    images with questions and answers
    demo/data/texts        texts alone
    demo/data/words        wide and tall pictures with a written word, which is asked for
    demo/data/stage*.yaml  the mixtures of the three stages (examples/mixtures/demo)
    demo/tokenizer         in Hugging Face format

What is there already is not made again. A data set appears under its name only when it is whole.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import shutil
from pathlib import Path

import webdataset
from tqdm import tqdm

from rsa_megatron.data import scenes
from rsa_megatron.data.demo_tokenizer import train_tokenizer
from rsa_megatron.data.shard_writer import index_shards

PROMPT = "<image>\nPlease generate detailed descriptions of the given image."
KINDS = ("captions", "questions", "texts", "words")
MIXTURES = Path(__file__).parent / "mixtures" / "demo"


def main(arguments: list[str] | None = None):
    args = parse(arguments)
    for kind in args.kinds:
        write_data_set(args.out / "data" / kind, kind, args)
    for mixture in MIXTURES.glob("*.yaml"):
        shutil.copy(mixture, args.out / "data")
    write_tokenizer(args.out / "tokenizer", args)


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="data sets to write")
    parser.add_argument("--train", type=int, default=8000, help="training scenes of each data set")
    parser.add_argument("--validation", type=int, default=1024, help="validation scenes of each data set")
    parser.add_argument("--test", type=int, default=0,
                        help="scenes of a third part, for figures that no setting was chosen by")  # fmt: skip
    parser.add_argument("--image-size", type=int, default=112, help="side of a picture, pixels")
    parser.add_argument("--shard-size", type=int, default=500, help="samples of a tar")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def write_data_set(folder: Path, kind: str, args) -> None:
    if folder.exists():
        print(f"{folder}: there already")
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    counts = {"train": args.train, "val": args.validation} | ({"test": args.test} if args.test else {})
    for split, count in counts.items():
        with webdataset.ShardWriter(f"{unfinished}/{split}-%05d.tar", maxcount=args.shard_size, verbose=0) as writer:
            for index in tqdm(range(count), desc=f"{folder} {split}", unit="scene", mininterval=1):
                writer.write(stored_sample(kind, index, split, args))
    prepare(unfinished, kind)
    unfinished.rename(folder)


def stored_sample(kind: str, index: int, split: str, args) -> dict:
    """A sample as webdataset writes it: LLaVA's conversations, what is in the scene, and the picture."""
    scene = scene_of(kind, index, split, args)
    seed = f"{args.seed}/{kind}/{split}/{index}"
    if kind == "words" and not scene.word:
        scene = dataclasses.replace(scene, word=scene.theme.words[index % 2])
    record = {"id": f"{kind}-{split}-{index:06d}", "conversations": conversations(kind, scene, seed)}
    sample = {"__key__": record["id"]}
    if kind != "texts":
        record["contents"] = scene.contents
        picture = io.BytesIO()
        image = scenes.render(scene, args.image_size, seed)
        if kind == "words":  # it stands at the top
            side = args.image_size
            image = image.crop((0, 0, side, side // 2) if index % 3 else (side // 4, 0, side - side // 4, side))
        image.save(picture, "PNG")
        sample["png"] = picture.getvalue()
    return sample | {"json": json.dumps(record).encode()}


def scene_of(kind: str, index: int, split: str, args) -> scenes.Scene:
    """Each data set has scenes of its own. Those of the test part have a content that is in no other part of any of them."""
    seed = args.seed + KINDS.index(kind)
    if split != "test":
        return scenes.make_scene(seed, index, validation=split == "val")
    candidates = (scenes.make_scene(f"{seed}/test/{number}", index, validation=True) for number in itertools.count())
    return next(scene for scene in candidates if content(scene) not in validation_contents(args.seed, args.validation))


def content(scene: scenes.Scene) -> tuple:
    """What training and validation are told apart by."""
    return scene.theme.name, *sorted((thing.colour, thing.noun) for thing in scene.things)


@functools.cache
def validation_contents(seed: int, count: int) -> set[tuple]:
    """Of all data sets: a setting may be chosen on any of them."""
    numbers = itertools.product(range(len(KINDS)), range(count))
    return {content(scenes.make_scene(seed + kind, index, validation=True)) for kind, index in numbers}


def conversations(kind: str, scene: scenes.Scene, seed) -> list[dict]:
    if kind == "captions":
        return turns([(PROMPT, scenes.caption(scene, seed))])
    if kind == "questions":
        (first, *others) = scenes.questions(scene, seed)
        return turns([("<image>\n" + first[0], first[1]), *others])
    if kind == "words":
        return turns([("<image>\nWhich word is written in the picture?", scene.word)])
    return turns([(f"Tell me about {scene.theme.name} pictures.", scenes.text(scene, seed))])


def turns(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair)]


def prepare(folder: Path, kind: str) -> None:
    """Energon's own index, and the subflavors that the task encoder reads."""
    index_shards(folder, subflavors={"kind": kind, "rsa": kind == "captions"}, num_workers=2)


def write_tokenizer(folder: Path, args) -> None:
    if folder.exists():
        print(f"{folder}: there already")
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    texts = [
        turn["value"]
        for kind in KINDS[:3]  # the words are in the questions too
        for index in tqdm(range(min(args.train, 2000)), desc=f"{folder} {kind}", unit="text", mininterval=1)
        for turn in conversations(kind, scenes.make_scene(args.seed + KINDS.index(kind), index, validation=False), index)
    ]
    train_tokenizer(texts, unfinished)
    unfinished.rename(folder)
    print(f"{folder}: trained on the texts of the data")


if __name__ == "__main__":
    main()
