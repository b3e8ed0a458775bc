"""Write the demo's data: rendered scenes as Energon data sets, and a tokenizer trained on their captions.

    python examples/demo/prepare_data.py --out demo

    demo/data/captions     images with dense captions, for the RSA loss (subflavor rsa: true)
    demo/data/questions    images with questions and answers
    demo/data/texts        texts alone
    demo/data/words        wide and tall pictures with a written word, which is asked for
    demo/data/stage*.yaml  the mixtures of the three stages (examples/mixtures/demo)
    demo/tokenizer         in Hugging Face format

What is there already is not made again. A data set appears under its name only when it is whole.
"""

import argparse
import shutil
from dataclasses import fields
from pathlib import Path

from rsa_megatron.data.synthetic.data_sets import KINDS, Sizes, write_data_set, write_tokenizer

MIXTURES = Path(__file__).parents[1] / "mixtures" / "demo"


def main(arguments: list[str] | None = None):
    args = parse(arguments)
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    for kind in args.kinds:
        write_data_set(args.out / "data" / kind, kind, sizes)
    for mixture in MIXTURES.glob("*.yaml"):
        shutil.copy(mixture, args.out / "data")
    write_tokenizer(args.out / "tokenizer", sizes)


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="data sets to write")
    parser.add_argument("--train", type=int, default=Sizes.train, help="training scenes of each data set; %(default)s")
    parser.add_argument(
        "--validation", type=int, default=Sizes.validation, help="validation scenes of each data set; %(default)s"
    )
    parser.add_argument(
        "--test",
        type=int,
        default=Sizes.test,
        help="scenes of a third part, for figures that no setting was chosen by; %(default)s",
    )
    parser.add_argument(
        "--image-size", type=int, default=Sizes.image_size, help="side of a picture, pixels; %(default)s"
    )
    parser.add_argument("--shard-size", type=int, default=Sizes.shard_size, help="samples of a tar; %(default)s")
    parser.add_argument("--seed", type=int, default=Sizes.seed)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
