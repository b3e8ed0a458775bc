"""Write texts for the language model of `make revision`: each caption after notes of what it will tell.

    python examples/revision/prepare_notes.py --data demo/data/captions --out demo/revision/notes

A projector in front of a frozen language model can tell it only what it is able to take from what stands before a text. Any real
one is: most of what it has read follows from something earlier. The demo's has read captions alone, the earliest words of which
follow from nothing. So this one reads notes first, drawn from what the scene contains, some left out, in any order, and none at
all before one caption in five. It sees no picture: the notes are words.

    playground. ball at the bottom right. two. brown ball. This is a picture of a playground, with ...
"""

import argparse
import json
import random
import sys
from pathlib import Path

import webdataset
from tqdm import tqdm

from rsa_megatron import atomic
from rsa_megatron.data.synthetic.data_sets import PROMPT, index_data_set, make_turns

#: Labels of a scene's contents that say no more than others of them, or nothing.
_LEFT_OUT = ("thing ", "colour ", "word None")
# Of labels these first words go, as a theme's or a number's name says of itself what it is.
_KINDS = ("theme ", "count ", "word ")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.out.exists():
        return print(f"{args.out}: there already")
    with atomic.new_folder(args.out) as unfinished:
        parts = {part: sorted(args.data.glob(f"{part}-*.tar")) for part in ("train", "val")}
        if not all(parts.values()):
            sys.exit(
                f"error: {args.data} has no shards of train and val; name captions that prepare_data.py has written"
            )
        for part, tars in parts.items():
            with webdataset.ShardWriter(f"{unfinished}/{part}-%05d.tar", maxcount=500, verbose=0) as writer:
                samples = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
                for sample in tqdm(samples, desc=f"{args.out} {part}", unit="text", mininterval=1):
                    writer.write(with_notes(sample))
        index_data_set(unfinished, "notes")


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="captions that prepare_data.py has written")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(arguments)


def with_notes(sample: dict) -> dict:
    """A sample of the captions with notes before its text."""
    record = json.loads(sample["json"])
    caption = record["conversations"][-1]["value"]
    text = " ".join([*notes(record["contents"], record["id"]), caption])
    record |= {"id": f"notes of {record['id']}", "conversations": make_turns([(PROMPT, text)])}
    return {"__key__": sample["__key__"], "png": sample["png"], "json": json.dumps(record).encode()}


def notes(contents: list[str], seed: str) -> list[str]:
    """Return the notes of a scene's labels, in random order."""
    draw = random.Random(f"{seed}/notes")
    if draw.random() < 0.2:
        return []
    chosen = [label for label in contents if not label.startswith(_LEFT_OUT) and draw.random() < 0.8]
    draw.shuffle(chosen)
    for kind in _KINDS:
        chosen = [label.removeprefix(kind) for label in chosen]
    return [f"{label}." for label in chosen]


if __name__ == "__main__":
    main()
