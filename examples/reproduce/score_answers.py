"""How often a model answers right about held-out pictures, by its export to Hugging Face and transformers.

    python examples/reproduce/score_answers.py --hf EXPORTED --data demo/data/questions demo/data/captions --part val

Greedy decoding gives the stored answer exactly when each of its tokens, and the end after it, is the likeliest after those
before it. So one forward pass over picture, question and stored answer says whether the greedy answer is right: no token is
generated. Tokens and tiles are those of training (conversation.py with the template qwen_1_5, tiles.py), the model is
transformers'. A conversation is asked as it is stored: of several questions the later ones have the earlier right answers before them.

    exact             share of answers that are right as a whole
    base rate         the same of who does not look: always the training part's most frequent answer to the same question
    tokens            share of the answers' tokens that are the likeliest
    content words     share of their words for themes, things, colours and places (of scenes) all of whose tokens are
    by question       the same of questions that begin alike
"""

import argparse
import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoTokenizer

from rsa_megatron import atomic
from rsa_megatron.data.conversation import IMAGE_TOKEN, encode
from rsa_megatron.data.synthetic import scenes
from rsa_megatron.data.tiles import ASPECT_RATIOS, ImageTiler
from rsa_megatron.models.hf_config import read_architecture

BATCH = 16


@dataclass(frozen=True)
class Answer:
    """One answer of a conversation, and where it stands in the tokens; its last token is the end."""

    question: str
    text: str
    positions: range


@dataclass
class Asked:
    """A picture with its conversation."""

    image: Image.Image
    tokens: list[int]
    answers: list[Answer]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        reader = Reader(args.hf, args.image_aspect_ratio)
        scores = {data.name: score(reader, data, args.part, args.samples) for data in args.data}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(in_words(scores))
    if args.out:
        atomic.write_text(args.out, json.dumps(scores, indent=1) + "\n")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="folder that megatron-to-hf has written")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="data sets that prepare_data.py has written"
    )
    parser.add_argument("--part", default="val", help="which part of them; %(default)s")
    parser.add_argument(
        "--image-aspect-ratio", choices=ASPECT_RATIOS, default="anyres", help="as in training; %(default)s"
    )
    parser.add_argument("--samples", type=int, help="the first N of each; default: all")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args(arguments)


def score(reader: "Reader", data: Path, part: str, num_samples: int | None) -> dict:
    """The figures of one data set.

    Raises:
        ValueError: it has no such part.
    """
    usual = usual_answers(data)
    counts, kinds = Counter(), defaultdict(Counter)
    samples = (asked(reader.tokenizer, image, record) for image, record in stored(data, part, num_samples))
    while batch := list(islice(samples, BATCH)):
        for sample, is_right in zip(batch, reader.right_tokens(batch)):
            for answer in sample.answers:
                found = judge(reader.tokenizer, sample, answer, is_right, usual)
                counts += found
                kinds[" ".join(answer.question.split()[:2])] += found
    return shares(counts) | {"by question": {kind: shares(found) for kind, found in sorted(kinds.items())}}


def shares(counts: Counter) -> dict:
    found = {
        "answers": counts["answers"],
        "exact": counts["exact"] / counts["answers"],
        "base rate": counts["usual"] / counts["answers"],
        "tokens": counts["right tokens"] / counts["tokens"],
    }
    return found | ({"content words": counts["right words"] / counts["words"]} if counts["words"] else {})


def stored(data: Path, part: str, num_samples: int | None) -> Iterator[tuple[Image.Image | None, dict]]:
    """(picture, record) of a part's samples in order."""
    shards = sorted(map(str, data.glob(f"{part}-*.tar")))
    if not shards:
        raise ValueError(f"{data} has no part {part!r}: no {part}-*.tar in it")
    for sample in islice(webdataset.WebDataset(shards, shardshuffle=False), num_samples):
        image = Image.open(io.BytesIO(sample["png"])).convert("RGB") if "png" in sample else None
        yield image, json.loads(sample["json"])


def usual_answers(data: Path) -> dict[str, str]:
    """{question: the training part's most frequent answer to it}."""
    found = defaultdict(Counter)
    for shard in sorted(data.glob("train-*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            for question, text in pairs(json.loads(sample["json"])):
                found[question][text] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in found.items()}


def pairs(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in record["conversations"]]
    return [(question.replace(IMAGE_TOKEN, "").strip(), text) for question, text in zip(values[::2], values[1::2])]


def asked(tokenizer, image: Image.Image, record: dict) -> Asked:
    """A conversation's tokens, <image> being one, and its answers in them."""
    text = encode(tokenizer, record["conversations"], "qwen_1_5", label_style="answer_only")
    # With answer_only the answers are trained on, each with its end: a stretch without a gap.
    edges = [i for i, (a, b) in enumerate(zip([False, *text.is_target], [*text.is_target, False])) if a != b]
    answers = [
        Answer(question, answer, range(first, end))
        for (question, answer), first, end in zip(pairs(record), edges[::2], edges[1::2], strict=True)
    ]
    return Asked(image, text.tokens, answers)


class Reader:
    """A model in transformers that is shown pictures as training showed them.

    Args:
        hf: folder that megatron-to-hf has written.
        image_aspect_ratio: "anyres", as transformers cuts pictures, or "square": the base tile alone.
    """

    def __init__(self, hf: Path, image_aspect_ratio: str):
        architecture = read_architecture(hf)
        vision = architecture.vision
        self.tokenizer = AutoTokenizer.from_pretrained(hf)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32).eval().to(self.device)
        self._side, self._max_tiles = vision.tokens_per_side, architecture.max_tiles
        self._image_token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._tiler = ImageTiler(
            image_size=vision.image_size,
            image_aspect_ratio=image_aspect_ratio,
            grid_pinpoints=architecture.grid_pinpoints,
        )

    def right_tokens(self, batch: list[Asked]) -> list[list[bool]]:
        """Of each sample's tokens, whether it is the likeliest after those before it (and the picture's)."""
        rows = [self._with_image_tokens(sample) for sample in batch]
        length = max(map(len, rows))
        # Padding at the end is seen by none of the tokens before it.
        ids_BS = torch.tensor(
            [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows], device=self.device
        )
        with torch.no_grad():
            likeliest_BS = self._logits(ids_BS, [sample.image for sample in batch]).argmax(-1).tolist()
        found = []
        for sample, row, likeliest in zip(batch, rows, likeliest_BS):
            right = [False] + [guess == token for guess, token in zip(likeliest, row[1:])]
            place = sample.tokens.index(self._image_token)
            found.append(right[:place] + right[place + len(row) - len(sample.tokens) :])
        return found

    def _with_image_tokens(self, sample: Asked) -> list[int]:
        """Its tokens, <image> as often as the picture has tokens."""
        (layout,) = self._tiler.layouts([sample.image])
        count = layout.num_tokens(self._side, self._max_tiles)
        return [copy for token in sample.tokens for copy in [token] * (count if token == self._image_token else 1)]

    def _logits(self, ids_BS: Tensor, pictures: list[Image.Image]) -> Tensor:
        tiles = [self._tiler.tiles([picture]).to(self.device) for picture in pictures]
        if self._tiler.image_aspect_ratio == "anyres":
            sizes = torch.tensor([[picture.height, picture.width] for picture in pictures])
            return self.model(
                input_ids=ids_BS, pixel_values=pad_sequence(tiles, batch_first=True), image_sizes=sizes
            ).logits
        # LLaVA-OneVision's own way adds a grid of tiles to each picture.
        features = self.model.model.vision_tower(torch.cat(tiles), output_hidden_states=True).hidden_states[-1]
        embedded_BSH = self.model.get_input_embeddings()(ids_BS)
        embedded_BSH[ids_BS == self._image_token] = self.model.model.multi_modal_projector(features).flatten(0, 1)
        return self.model(inputs_embeds=embedded_BSH).logits


def judge(tokenizer, sample: Asked, answer: Answer, is_right: list[bool], usual: dict[str, str]) -> Counter:
    """What one answer adds to the counts."""
    of_answer = [is_right[position] for position in answer.positions]
    words = content_words(tokenizer, [sample.tokens[position] for position in answer.positions][:-1])
    return Counter(
        {
            "answers": 1,
            "exact": all(of_answer),
            "usual": usual.get(answer.question) == answer.text,
            "tokens": len(of_answer) - 1,
            "right tokens": sum(of_answer[:-1]),
            "words": len(words),
            "right words": sum(all(of_answer[place] for place in word) for word in words),
        }
    )


def content_words(tokenizer, tokens: list[int]) -> list[list[int]]:
    """For each word for what is in a scene, which of the tokens it is in."""
    origin, text = [], ""
    for place, token in enumerate(tokens):
        piece = tokenizer.decode([token])
        origin += [place] * len(piece)
        text += piece
    return [sorted({*origin[match.start() : match.end()]}) for match in CONTENT.finditer(text)]


def vocabulary() -> set[str]:
    """The words of the labels: themes, things, colours and places. (Not the numbers, and not the words written on it.)"""
    nouns = {noun for theme in scenes.THEMES for noun in theme.things}
    places = {word for place in scenes.PLACES.values() for word in place.split()} - {"at", "in", "on", "the"}
    return nouns | places | set(scenes.COLOURS) | {theme.name for theme in scenes.THEMES}


CONTENT = re.compile(rf"\b({'|'.join(sorted(map(re.escape, vocabulary()), key=len, reverse=True))})\b")


def in_words(scores: dict[str, dict]) -> str:
    lines = []
    for data, found in scores.items():
        lines.append(f"{data}: {found['answers']} answers")
        lines += [f"  {name:<16} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
        for kind, of_kind in found["by question"].items():
            lines.append(f"  {kind + ' ...':<16} {of_kind['exact']:.4f} (base rate {of_kind['base rate']:.4f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
