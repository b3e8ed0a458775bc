"""The command line of the training script: our flags beside Megatron's, what a recipe sets, what is checked.

Nothing here trains. Every mistake that can be seen before the model is built ends the run with one line.
"""

import argparse
import dataclasses
import functools
import traceback
from pathlib import Path
from typing import NoReturn

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config
from transformers import AutoTokenizer

from rsa_megatron import megatron_on_cpu
from rsa_megatron.alignment.metrics import METRICS, NEIGHBOUR_METRICS
from rsa_megatron.config import RSAConfig
from rsa_megatron.data.conversation import LABEL_STYLES, TEMPLATES, check_tokenizer
from rsa_megatron.data.dataset_checks import check_data, check_rsa_flags
from rsa_megatron.data.loaders import count_epoch_iterations, explain_unread_validation
from rsa_megatron.data.raw_samples import check_embeddings
from rsa_megatron.data.tiles import ASPECT_RATIOS
from rsa_megatron.hooks.isolated_captions import check_settings
from rsa_megatron.hooks.layer_hooks import layer_number
from rsa_megatron.models.architectures import Architecture
from rsa_megatron.models.hf_config import find_architecture, is_model_folder
from rsa_megatron.models.layer_specs import LOCAL_ARGUMENTS, layer_specs
from rsa_megatron.models.llava_onevision import PARTS
from rsa_megatron.plugin import RSAPlugin
from rsa_megatron.ranks import exit_with_error, exit_with_own_error, get_rank, print_once
from rsa_megatron.recipes import recipe
from rsa_megatron.training import (
    ON_CPU,
    console,
    embedding_arguments,
    learning_rates,
    megatron_patches,
    metrics_file,
    mfu,
)
from rsa_megatron.training.embedding_arguments import image_embeddings, set_image_embeddings
from rsa_megatron.training.flag_checks import check_flags, explain
from rsa_megatron.training.run_folder import (
    TRACKER,
    check_agreement,
    check_save,
    has_checkpoint,
    is_same_folder,
    take_weights_of_another_stage,
)
from rsa_megatron.training.schedule import settle_schedule


def parse(rsa: RSAPlugin, settings: dict | None = None, *, reads_data: bool = True):
    """The run's arguments: Megatron's, ours and the plugin's, with `settings` or else --stage's as their defaults.

    Ends the process with one line where they are wrong. `reads_data`: whether --data-path is needed.
    """
    try:
        args = parse_megatron(functools.partial(add_arguments, rsa=rsa, settings=settings))
        if is_same_folder(args.load, args.save):
            args.load = args.save  # however it is written
        console.end_at_signals(args)
        weights = take_weights_of_another_stage(args)
        goes_back = check_save(args)
        check_arguments(args)
        projector = set_image_embeddings(args, rsa.config, architecture_of(args).vision.hidden_size)
        if rsa.config.text_source == "caption" and rsa.config.weight > 0:
            check_settings(args, packed=args.transformer_impl == "transformer_engine")
        if reads_data:
            check_data_path(args, rsa.config.weight)
        set_one_epoch(args)
        schedule = settle_schedule(args)
    except (ValueError, AssertionError, OSError) as error:
        end_with(error)
    rsa.log_interval = args.log_interval
    for message in filter(None, (weights, goes_back, projector, schedule, explain_lone_pairs(args, rsa.config))):
        print_once(message)
    if args.virtual_pipeline_model_parallel_size:
        print_once(
            "WARNING: megatron-core cannot save the data position of interleaved pipelines; "
            "a resumed run will need --restart-data"
        )
    elif args.save:
        args.dataloader_save = dataloader_folder(args.save)
    if "language" not in args.trainable and not has_checkpoint(args):
        print_once(
            "WARNING: the language model is frozen and no checkpoint was found: it keeps its random initialisation"
        )
    return args


def parse_megatron(extra_args_provider) -> argparse.Namespace:
    """Megatron's parse_and_validate_args; what it does not survive is a ValueError, and a dry run writes no file."""
    try:
        args = parse_args(extra_args_provider)
        validate_args(args)
        # Megatron's configs have checks of their own, which would end in a traceback on every rank.
        core_transformer_config_from_args(args)
        if not args.skip_train:
            get_megatron_optimizer_config(args)
            get_megatron_ddp_config(args)
    except (RuntimeError, TypeError, AttributeError, ArithmeticError, LookupError, ImportError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"Megatron cannot use these flags: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        ) from error
    # Megatron begins to write to TensorBoard and wandb as it takes the arguments.
    unwritten = {"tensorboard_dir": None, "wandb_project": ""} if args.dry_run else {}
    try:
        set_global_variables(argparse.Namespace(**{**vars(args), **unwritten}) if unwritten else args)
    except (ValueError, AssertionError):
        raise
    except Exception as error:  # of TensorBoard's or wandb's, on the rank that writes
        exit_with_own_error(f"{type(error).__name__}: {error}")
    return args


def end_with(error: Exception) -> NoReturn:
    """End the run with one line for a mistake that every rank finds."""
    # Some of Megatron's assertions have no text: their own line says what was wrong.
    exit_with_error(str(error) or traceback.extract_tb(error.__traceback__)[-1].line)


def add_arguments(parser, rsa: RSAPlugin, settings: dict | None):
    """Megatron's extra_args_provider."""

    def raise_value_error(message: str):
        raise ValueError(explain(parser, message))

    parser.error = raise_value_error  # argparse would print the usage of all of Megatron's flags, on every rank
    megatron_patches.repair_help(parser)
    of_megatron = {group.title for group in parser._action_groups}
    add_flags(parser)
    rsa.add_arguments(parser)
    console.shorten_help(parser, ours={group.title for group in parser._action_groups} - of_megatron)
    known, _ = parser.parse_known_args()
    set_default_tokenizer(parser, known)
    architecture = find_architecture(known.model)
    settings = settings or recipe(known.model, known.stage)
    parser.set_defaults(
        **architecture.megatron_defaults(),
        **settings,
        **(LOCAL_ARGUMENTS if ON_CPU or not HAVE_TE else {}),
        **(megatron_on_cpu.MEGATRON_ARGUMENTS if ON_CPU else {}),
        tokenizer_type="HuggingFaceTokenizer",
        dataloader_type="external",
        exit_signal_handler=True,  # a run that is ended by a signal has saved what it did
        split="1,0,0",  # Energon's own splits count; this silences Megatron's
    )
    # What a recipe says must not contradict the flag that takes its place.
    if known.step_batch_size_schedule:
        parser.set_defaults(global_batch_size=None)
    if known.train_samples:
        parser.set_defaults(train_iters=None)
    known, _ = parser.parse_known_args()
    check_flags(parser, known)
    multiple = max(1, known.make_vocab_size_divisible_by * known.tensor_model_parallel_size)
    parser.set_defaults(padded_vocab_size=-(-architecture.vocab_size // multiple) * multiple)
    # The plugin's settings are its config; its flags, parsed after this, override what the recipe says.
    rsa.config = dataclasses.replace(
        rsa.config, **{k.removeprefix("rsa_"): v for k, v in settings.items() if k.startswith("rsa_")}
    )
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the training script's own flags."""
    group = parser.add_argument_group("LLaVA with RSA")
    group.add_argument(
        "--model", default="demo", help="architecture, or a Hugging Face folder; sets the model's Megatron arguments"
    )
    group.add_argument(
        "--stage", default="1", help="training stage: revision, 1, 1.5 or 2; sets the run's Megatron arguments"
    )
    group.add_argument(
        "--trainable", nargs="+", choices=list(PARTS), help="modules that are trained; the others are frozen"
    )
    learning_rates.add_arguments(group)
    metrics_file.add_arguments(group)
    group.add_argument("--template", choices=TEMPLATES, help="how a conversation becomes tokens")
    group.add_argument(
        "--label-style",
        choices=LABEL_STYLES,
        default="llava",
        help="which tokens of the template qwen_1_5 are trained on: as in LLaVA, or only the answers",
    )
    group.add_argument(
        "--image-aspect-ratio",
        choices=ASPECT_RATIOS,
        help="square: an image is squashed into one tile; anyres: a base tile and a grid of tiles",
    )
    group.add_argument(
        "--image-grids",
        nargs="+",
        type=grid,
        metavar="ROWSxCOLUMNS",
        help="the grids of tiles that anyres may choose from, of equally good ones the first; default: the model's own",
    )
    embedding_arguments.add_arguments(group)
    group.add_argument(
        "--drop-last",
        action="store_true",
        help="in a single pass over the data, skip each reader's last samples that do not fill a micro-batch, "
        "and the last iterations for which not every rank has data",
    )
    group.add_argument("--shuffle-buffer-size", type=int, default=1000, help="Energon's, in samples")
    group.add_argument(
        "--mutual-knn-samples",
        type=int,
        default=1000,
        help="validation pairs for mutual-knn at each evaluation; 0: none",
    )
    group.add_argument("--mutual-knn-k", type=int, default=10, help="neighbours")
    group.add_argument(
        "--eval-metrics",
        nargs="+",
        choices=list(METRICS),
        default=["mutual-knn"],
        help="scores of alignment at each evaluation, on the pairs and layers of --mutual-knn-samples and --mutual-knn-layers",
    )
    group.add_argument(
        "--mutual-knn-layers",
        type=layer_pairs,
        default=[(-1, -1)],
        metavar="VISION:TEXT,...",
        help="layers to compare, as --mutual-knn-layers=-1:-1,12:14; -1 is the last, 0 what goes into the first",
    )
    group.add_argument(
        "--restart-data", action="store_true", help="resume from a checkpoint with the data from its beginning"
    )
    mfu.add_arguments(group)
    console.add_arguments(group)
    group.add_argument("--dry-run", action="store_true", help="print what would run, and stop")


def set_default_tokenizer(parser, known) -> None:
    """Default to the model's tokenizer: in its folder, or beside the checkpoint that the run starts from."""
    folders = [Path(folder, "hf") for folder in (known.load, known.pretrained_checkpoint) if folder] + [
        Path(known.model)
    ]
    found = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    if not (found or known.tokenizer_model):
        raise ValueError("--tokenizer-model is missing: name a folder with a tokenizer in Hugging Face format")
    if not known.tokenizer_model:
        parser.set_defaults(tokenizer_model=str(found))


def grid(text: str) -> tuple[int, int]:
    """ "2x3" as (2, 3)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text} is no grid of ROWSxCOLUMNS, such as 2x3")
    return int(rows), int(columns)


def layer_pairs(text: str) -> list[tuple[int, int]]:
    """ "-1:-1,12:14" as [(-1, -1), (12, 14)]."""
    try:
        pairs = [tuple(int(layer) for layer in pair.split(":")) for pair in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is no list of VISION:TEXT layers, such as -1:-1,12:14")
    return pairs


def check_arguments(args) -> None:
    """What would otherwise fail later, on every rank, and in other words."""
    layer_specs(args.transformer_impl)
    learning_rates.check_arguments(args)
    mfu.check_arguments(args)
    architecture = architecture_of(args)
    architecture.check_layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        chunks=args.virtual_pipeline_model_parallel_size or 1,
    )
    check_parallelism(args)
    for pair in args.mutual_knn_layers:
        for layer, side in zip(pair, (architecture.vision, architecture.decoder)):
            layer_number(layer, side.num_layers, named="--mutual-knn-layers")
    # --load with --save's folder is a run that goes on if there is something to go on from.
    named = "load" if args.load and args.load != args.save else "pretrained_checkpoint"
    if getattr(args, named) and not has_checkpoint(args):
        raise ValueError(
            f"--{named.replace('_', '-')} {getattr(args, named)}: no {TRACKER} there; name the "
            "folder that --save or hf-to-megatron has written"
        )
    check_model(args)


def check_data_path(args, rsa_weight: float) -> None:
    if not args.data_path:
        raise ValueError("--data-path is missing: name a prepared Energon data set or a mixture (.yaml)")
    if len(args.data_path) > 1:
        raise ValueError(f"--data-path takes one data set, not {len(args.data_path)}: name a mixture (.yaml) of them")
    if get_rank() == 0:
        check_data(
            args.data_path[0],
            (["train"] if not args.skip_train else []) + (["val"] if args.eval_iters else []),
            num_readers=args.data_parallel_size * max(1, args.num_workers),
            micro_batch_size=args.eval_micro_batch_size,
        )
        if args.eval_iters:
            say_unread_validation(args)
        if embeddings := image_embeddings(args):
            check_embeddings(args.data_path[0], "val" if args.skip_train else "train", embeddings)
    if not args.skip_train:
        check_rsa_flags(args.data_path[0], rsa_weight=rsa_weight)


def explain_lone_pairs(args, rsa: RSAConfig) -> str | None:
    """Return a warning where a pair of image and caption has no other to be compared with, so that the RSA loss is always 0."""
    most = args.micro_batch_size * args.data_parallel_size if rsa.scope == "micro-batch" else args.global_batch_size
    if args.skip_train or not rsa.weight or most > 1:
        return None
    return (
        f"WARNING: RSA is on (--rsa-weight {rsa.weight:g}), but compares the pairs of a micro-batch on all data-parallel ranks, and "
        "there is one: its loss is always 0; raise --micro-batch-size, use more ranks, or --rsa-scope global-batch"
    )


def say_unread_validation(args) -> None:
    """Print once which validation samples no evaluation reads, and which scores cannot be."""
    has_neighbours = not set(NEIGHBOUR_METRICS).isdisjoint(args.eval_metrics)
    unread = explain_unread_validation(
        args.data_path[0],
        data_parallel_size=args.data_parallel_size,
        num_workers=args.num_workers,
        micro_batch_size=args.eval_micro_batch_size,
        micro_batches=count_eval_micro_batches(args),
        pairs=args.mutual_knn_samples,
        neighbours=args.mutual_knn_k * has_neighbours,
    )
    if unread:
        print_once(unread)


def count_eval_micro_batches(args) -> int:
    """Count the micro-batches that a rank reads in an evaluation (megatron.training's evaluate)."""
    return args.eval_iters * (args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size))


def check_parallelism(args) -> None:
    if args.sequence_parallel and args.seq_length % args.tensor_model_parallel_size:
        raise ValueError(
            f"--seq-length {args.seq_length} must be a multiple of --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} under --sequence-parallel"
        )
    if args.transformer_impl != "transformer_engine":
        if args.context_parallel_size > 1:
            raise ValueError("--context-parallel-size above 1 needs Transformer Engine (and a GPU)")
        if args.sequence_parallel and not ON_CPU:
            raise ValueError("--sequence-parallel needs Transformer Engine on GPUs: LLaVAModel asks for it")


def check_model(args) -> None:
    """Check that flags, tokenizer and --model are consistent with each other and with what an export will contain."""
    architecture, tokenizer = architecture_of(args), load_tokenizer(args)
    check_tokenizer(tokenizer, args.template)
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer {args.tokenizer_model} has {len(tokenizer)} ids, --model {args.model} {architecture.vocab_size} "
            "word embeddings: name the tokenizer that the model was made for"
        )
    if args.rotary_percent != 1 or args.kv_channels != args.hidden_size // args.num_attention_heads:
        raise ValueError("--rotary-percent and --kv-channels: the model is a Qwen2, which has neither; leave them out")
    check_agreement(args, architecture, tokenizer)
    if not is_model_folder(args.model):
        return
    if dataclasses.replace(architecture, image_embedding_width=None) != find_architecture(args.model):
        raise ValueError(
            f"--model {args.model}: its sizes are those of its config.json; leave out the flags that change them"
        )
    if AutoTokenizer.from_pretrained(args.model).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model} has other ids than the tokenizer in --model {args.model}: name that one"
        )


def set_one_epoch(args) -> None:
    """Without a number of iterations or samples a run is one pass over the training part."""
    args.one_epoch = not (args.train_iters or args.train_samples or args.skip_train)
    if args.drop_last and not args.one_epoch:
        raise ValueError(
            "--drop-last is about a single pass over the data; leave it out, or leave out the number of iterations"
        )
    if not args.one_epoch:
        return
    args.train_iters = count_epoch_iterations(
        args.data_path[0],
        data_parallel_size=args.data_parallel_size,
        num_workers=args.num_workers,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=get_current_running_global_batch_size(),  # less with --decrease-batch-size-if-needed
        drop_last=args.drop_last,
    )
    if not args.train_iters:
        raise ValueError(
            f"--data-path {args.data_path[0]}: one pass over it does not fill a batch of {args.global_batch_size}; lower "
            "--global-batch-size or leave out --drop-last"
        )
    print_once(f"one pass over the data: {args.train_iters} iterations of {args.global_batch_size} samples")


def architecture_of(args) -> Architecture:
    return find_architecture(args.model).with_arguments(vars(args))


def dataloader_folder(checkpoint_folder: str) -> str:
    return str(Path(checkpoint_folder) / "dataloader")


@functools.cache
def _tokenizer(path: str):
    return AutoTokenizer.from_pretrained(path)


def load_tokenizer(args):
    """The Hugging Face tokenizer; Megatron's own wrapper of it hides the special tokens."""
    return _tokenizer(args.tokenizer_model)
