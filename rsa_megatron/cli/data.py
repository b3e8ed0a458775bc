"""Make training data from what you have, and look at it.

    rsa-megatron data pack SOURCE --out DIR --rsa                               Energon shards: --data-path DIR
    rsa-megatron data link SOURCE --out DIR --images ROOT                       images stay where they are: --data-path DIR/mixture.yaml
    rsa-megatron data show PATH --index 3 --tokenizer TOKENIZER --stage 1.5     one sample
    rsa-megatron data show PATH --packed 0 --tokenizer TOKENIZER --stage 1.5    a packed row
    rsa-megatron data fill PATH --tokenizer TOKENIZER --stage 1.5               how full packed rows would be

SOURCE: records with conversations, messages or captions in JSON, JSONL or parquet (one file, or a folder of them), or in a
.csv or .tsv; LLaVA-OneVision's YAML of such files; a folder of images with a text file beside each, or with a metadata.jsonl
or .csv; COCO's captions .json, Karpathy's dataset_*.json. PATH is a folder that pack has written, or a mixture; for one sample
also a SOURCE.

A sample that cannot be used is skipped; DIR/skipped.jsonl lists each with the reason. A run that was killed resumes where
it stopped; DIR appears under its name when it is complete. DIR/summary.json and summary.png show what is in it.
"""

import argparse
import json
import random
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from rsa_megatron import atomic
from rsa_megatron.cli.data_fill import add_fill_arguments, fill
from rsa_megatron.cli.data_first_run import format_first_run
from rsa_megatron.cli.data_summary import Figures, format_summary, write_summary
from rsa_megatron.cli.show_packed_row import show_packed
from rsa_megatron.cli.show_sample import add_show_arguments, say_left_out, show
from rsa_megatron.cli.training_encoder import load_tokenizer
from rsa_megatron.command_line import Parser, report_errors
from rsa_megatron.data.field_values import escape_surrogates, is_absent
from rsa_megatron.data.prepare import sample_checks
from rsa_megatron.data.prepare.sample_checks import ImportedSample
from rsa_megatron.data.prepare.shard_writer import Lines, TarShards, index_lines, index_shards
from rsa_megatron.data.sources.open_records import open_records
from rsa_megatron.data.sources.record import Record, Source, Unusable


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # what matters ends in skipped.jsonl
    warnings.filterwarnings("ignore", message="'pin_memory'")  # Energon asks for it on any machine
    warnings.filterwarnings("ignore", message="(?s).*is deprecated, use the default instead and set the sample_type")
    resumes = args.command not in ("show", "fill")
    with report_errors(interrupted="interrupted" + "; the same command resumes from here" * resumes):
        run(args)


def run(args) -> None:
    if args.command == "fill":
        fill(args)
    elif args.command == "show":
        show(args) if args.packed is None else show_packed(args)
    else:
        make(args)


def parse(arguments: list[str] | None):
    parser = Parser(prog="rsa-megatron data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("pack", "write Energon shards"),
        ("link", "write JSONL files that point to images where they are"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument(
            "source", type=Path, metavar="SOURCE", help="the data; `rsa-megatron data --help` lists the formats"
        )
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument(
            "--images", type=Path, help="folder that the paths of images are relative to; default: SOURCE's own"
        )
        command.add_argument(
            "--split",
            default="train",
            help="split to take of a folder whose files' names say one, of tables with a column `split`, and of Karpathy's JSON; "
            "default: %(default)s",
        )
        command.add_argument(
            "--language-code",
            default="en",
            help="language to take of tables with a column `language`; default: %(default)s",
        )
        command.add_argument("--rsa", action="store_true", help="samples with one image enter the RSA loss")
        command.add_argument(
            "--val",
            default="0.01",
            help="held out for validation: a fraction below 1 (of few samples at least 16, or a quarter), or a number of samples; "
            "default: %(default)s",
        )
        command.add_argument(
            "--num-workers", type=int, default=2, help="images decoded in parallel; default: %(default)s"
        )
        command.add_argument(
            "--seed",
            type=int,
            default=0,
            help="seed of the validation split and of sampling_strategy random; default: %(default)s",
        )
        command.add_argument(
            "--tokenizer", type=Path, help="Hugging Face folder; the summary then counts tokens, not words"
        )
        if name == "pack":
            command.add_argument("--shard-size", type=int, default=1000, help="samples per tar; default: %(default)s")
    add_show_arguments(commands.add_parser("show", help="show one sample, or one packed row, as training sees it"))
    add_fill_arguments(commands.add_parser("fill", help="measure how full packed rows would be"))
    args = parser.parse_args(arguments)
    if args.command in ("pack", "link") and args.num_workers < 1:
        parser.error("--num-workers must be at least 1")
    if args.command == "pack" and args.shard_size < 1:
        parser.error("--shard-size must be at least 1")
    return args


def make(args) -> None:
    """Run pack and link."""
    source = open_records(
        args.source, images=args.images, seed=args.seed, split=args.split, language=args.language_code
    )
    say_left_out(source)
    image_root = (args.images or source.image_root).resolve()
    if not image_root.is_dir():
        raise ValueError(f"--images {image_root} is not a folder")
    settings = {
        "command": args.command,
        "source": str(args.source.resolve()),
        "records": len(source),
        "images": str(image_root),
        "rsa": args.rsa,
        "val": args.val,
        "seed": args.seed,
        "tokenizer": args.tokenizer and str(args.tokenizer.resolve()),
        "shard-size": getattr(args, "shard_size", None),
        "split": args.split,
        "language-code": args.language_code,
    }
    held_out = choose_held_out(len(source), args.val, args.seed)
    if is_finished(args.out, settings):
        print(f"{args.out}: already complete")
        return
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    with atomic.explain_full_disk(unfinished, "make room, and the same command resumes from here"):
        figures, num_shards = write_folder(args, source, held_out, unfinished, settings)
    print(f"{args.out}: {format_summary(figures, num_shards)}")
    print(f"    skipped samples: {args.out / 'skipped.jsonl'}")
    print(f"    RSA: {describe_rsa(args, figures)}")
    path = args.out if args.command == "pack" else args.out / "mixture.yaml"
    print(f"    train with --data-path {path}; a first run, to see that all fits together:")
    print(format_first_run(path, figures.splits, takes_part=args.rsa))


def write_folder(args, source: Source, held_out: set[int], unfinished: Path, settings: dict) -> tuple[Figures, int]:
    """Write the folder, or what a killed run has left to write, and give it its name; return its figures and number of shards."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    state = open_unfinished(unfinished, settings)
    figures = Figures(tokenizer, state.get("figures"))
    write(source, held_out, unfinished, settings, state, figures, args.num_workers)
    if not figures.splits["train"]:
        skipped = unfinished / "skipped.jsonl"
        with skipped.open() as file:
            first = json.loads(file.readline() or '{"reason": "all are held out by --val"}')
        raise ValueError(
            f"{args.source}: no sample for training can be used ({'; '.join(figures.list_skipped())}); the first: "
            f"{first['reason']}; see {skipped}"
        )
    if args.command == "pack":
        index_shards(unfinished, subflavors={"rsa": args.rsa}, num_workers=args.num_workers)
    else:
        index_lines(unfinished, Path(settings["images"]), rsa=args.rsa)
    num_shards = len(list(unfinished.glob("*.tar")))
    write_summary(unfinished, settings, figures, num_shards)
    (unfinished / "state.json").unlink()
    unfinished.rename(args.out)
    return figures, num_shards


def describe_rsa(args, figures: Figures) -> str:
    """Say whether what was written takes part in the RSA loss, and how to change it."""
    num_pairs, num_all = figures.histograms["images of a sample"][1], sum(figures.splits.values())
    place = args.out / (".nv-meta/dataset.yaml" if args.command == "pack" else "mixture.yaml")
    if not num_pairs:
        return f"no sample takes part: none of the {num_all} has exactly one image"
    of_all = f"the {num_pairs} of {num_all} samples with exactly one image"
    if not args.rsa:
        return f"no sample takes part (no --rsa); to let {of_all} in, write rsa: true in {place}, or in a mixture"
    return f"{of_all} take part (--rsa); to keep them out, write rsa: false in {place}, or in a mixture"


def choose_held_out(num_records: int, val: str, seed: int) -> set[int]:
    """Choose the records of the validation split, by number. Those that cannot be used are not replaced."""
    if not re.fullmatch(r"[0-9]+|0?\.[0-9]+", val):
        raise ValueError(f"--val {val} is neither a fraction below 1, such as 0.01, nor a number of samples")
    count = int(val) if val.isdigit() else round(float(val) * num_records)
    if not val.isdigit() and float(val) and num_records >= 20:
        # A validation that takes place at all: a micro-batch, and more pairs than neighbours are looked for.
        count = max(count, min(16, num_records // 4))
    if count >= num_records:
        raise ValueError(f"--val {val} leaves nothing of {num_records} samples to train on")
    return set(random.Random(seed).sample(range(num_records), count))


def is_finished(folder: Path, settings: dict) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "summary.json").is_file():
        raise ValueError(f"--out {folder} already exists and was not written by this command: name another folder")
    check_settings(folder, json.loads((folder / "summary.json").read_text())["settings"], settings)
    return True


def open_unfinished(folder: Path, settings: dict) -> dict:
    """Make the folder, or open a killed run's; return what that wrote last. One that holds no sample yet is begun anew."""
    path = folder / "state.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    if state and not state.get("figures", {}).get("splits", {}).get("train"):
        shutil.rmtree(folder)  # whatever flags it was started with: they may be what was wrong
        state = {}
    atomic.make_folder(folder)
    atomic.remove_unfinished_files(folder)
    if not state:
        write_state(folder, {"settings": settings})
        return {}
    check_settings(folder, state["settings"], settings)
    return state


def check_settings(folder: Path, then: dict, now: dict) -> None:
    for name, value in now.items():
        # A folder of an earlier version lacks the later settings.
        if name in then and then[name] != value:
            raise ValueError(
                f"{folder} was started with {name} {then[name]}, this run has {value}: name another --out, or remove it"
            )


def write(
    source: Source, held_out: set[int], folder: Path, settings: dict, state: dict, figures: Figures, num_workers: int
) -> None:
    """Write all records from the position of `state` on into the files of `folder`."""
    packs = settings["command"] == "pack"
    image_root = Path(settings["images"])
    outputs = open_outputs(folder, settings, state.get("positions", {}))

    def check(record: Record) -> ImportedSample | Unusable:
        try:
            return sample_checks.check(record, image_root)
        except Unusable as fault:
            return fault
        except Exception as error:  # one record must not end what thousands of others are read by
            return Unusable(
                "cannot be read", f"it cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
            )

    def remember(next_record: int) -> None:
        positions = {name: output.position() for name, output in outputs.items()}
        write_state(
            folder, {"settings": settings, "next": next_record, "positions": positions, "figures": figures.get_state()}
        )

    start = state.get("next", 0)
    tqdm.monitor_interval = 0  # its thread would live on while Energon's indexing forks
    progress = tqdm(total=len(source), initial=start, desc=str(folder), unit="sample", mininterval=1)
    for record, found in map_in_order(check, source.records(start), num_workers):
        if isinstance(found, Unusable):
            fault = {"record": record.number, "place": record.place, "id": get_id(record), "kind": found.kind}
            figures.skip(found.kind, fault["id"] if fault["id"] is not None else record.place)
            is_time = outputs["skipped"].write(fault | {"reason": str(found)})
        else:
            split = "val" if record.number in held_out else "train"
            if not packs and any(image.path is None for image in found.images):
                raise ValueError(
                    f"{record.place}: its images are stored in the file itself, so link has nothing to point to: use pack"
                )
            figures.add(split, found)
            is_time = outputs[split].write(found if packs else found.as_line())
        if is_time:
            remember(record.number + 1)
        progress.update()
    progress.close()
    remember(len(source))
    for output in outputs.values():
        output.close()


def open_outputs(folder: Path, settings: dict, positions: dict) -> dict[str, TarShards | Lines]:
    """Open the files of each split and of skipped samples, at their positions."""
    outputs = {"skipped": Lines(folder / "skipped.jsonl", positions.get("skipped"))}
    for split in ("train", "val"):
        if settings["command"] == "pack":
            outputs[split] = TarShards(folder, split, settings["shard-size"], positions.get(split))
        else:
            outputs[split] = Lines(folder / f"{split}.jsonl", positions.get(split))
    return outputs


def map_in_order(function: Callable, items: Iterable, num_workers: int) -> Iterator[tuple]:
    """Yield (item, function(item)) in the items' order, some ahead in threads: Pillow decodes without Python's lock."""
    with ThreadPoolExecutor(num_workers) as pool:
        ahead = deque()
        for item in items:
            ahead.append((item, pool.submit(function, item)))
            if len(ahead) > 4 * num_workers:
                item, future = ahead.popleft()
                yield item, future.result()
        for item, future in ahead:
            yield item, future.result()


def get_id(record: Record) -> str | int | None:
    """Return the record's own id, for the list of skipped samples."""
    found = record.content.get("id") if isinstance(record.content, dict) else None
    return found if isinstance(found, int) else None if is_absent(found) else escape_surrogates(str(found))


def write_state(folder: Path, state: dict) -> None:
    """Write state.json atomically."""
    atomic.write_text(folder / "state.json", json.dumps(state))
