"""The command line of the training script: our flags beside Megatron's, what a recipe sets, what is checked.

Nothing here trains. Every mistake that can be seen before the model is built ends the run with one line.
"""

import argparse
import dataclasses
import functools
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config
from transformers import AutoTokenizer

from rsa_megatron import megatron_on_cpu, screen
from rsa_megatron.data.conversation import check_tokenizer
from rsa_megatron.hooks.isolated_captions import check_settings
from rsa_megatron.hooks.layer_hooks import layer_number
from rsa_megatron.models.folder_kinds import explain_hf_folder
from rsa_megatron.models.hf_config import find_architecture, is_model_folder
from rsa_megatron.models.layer_specs import LOCAL_ARGUMENTS, layer_specs
from rsa_megatron.plugin import RSAPlugin
from rsa_megatron.ranks import exit_with_error, exit_with_own_error, get_rank, print_once
from rsa_megatron.recipes import recipe, unpack
from rsa_megatron.training import ON_CPU, console, learning_rates, megatron_patches, mfu, packing_arguments
from rsa_megatron.training.checkpoint_faults import check_whole
from rsa_megatron.training.data_arguments import check_data_path, explain_lone_pairs, set_one_epoch
from rsa_megatron.training.embedding_arguments import set_image_embeddings
from rsa_megatron.training.flag_checks import check_flags
from rsa_megatron.training.own_flags import add_flags
from rsa_megatron.training.run_folder import (
    TRACKER,
    check_agreement,
    check_save,
    has_checkpoint,
    is_same_folder,
    take_weights_of_another_stage,
)
from rsa_megatron.training.schedule import settle_schedule
from rsa_megatron.training.task_encoders import architecture_of, load_tokenizer
from rsa_megatron.training.unknown_flags import explain_unknown
from rsa_megatron.training.value_checks import check_length, check_values


def parse(rsa: RSAPlugin, settings: dict | None = None, *, reads_data: bool = True):
    """The run's arguments: Megatron's, ours and the plugin's, with `settings` or else --stage's as their defaults.

    Ends the process with one line where they are wrong. `reads_data`: whether --data-path is needed.
    """
    try:
        args = parse_megatron(functools.partial(add_arguments, rsa=rsa, settings=settings))
        if is_same_folder(args.load, args.save):
            args.load = args.save  # however it is written
        console.end_at_signals(args)
        console.choose_log_of_failure(args)
        weights = take_weights_of_another_stage(args)
        goes_back = check_save(args)
        check_arguments(args)
        projector = set_image_embeddings(args, rsa.config, architecture_of(args).vision.hidden_size)
        if rsa.config.text_source == "caption" and rsa.config.weight > 0:
            check_settings(args, packed=args.transformer_impl == "transformer_engine")
        args.copies_captions = rsa.config.text_source == "caption" and rsa.config.weight > 0
        if reads_data:
            check_data_path(args, rsa.config.weight)
        set_one_epoch(args)
        check_length(args)
        schedule = settle_schedule(args)
    except (ValueError, AssertionError, OSError) as error:
        end_with(error)
    rsa.log_interval, rsa.say = args.log_interval, screen.show
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
        packing_arguments.check_packing(args)
        check_values(args, architecture_of(args))
        positions = args.max_position_embeddings  # of a sample, in a row that may be longer
        if args.packing_buffer_size:
            args.max_position_embeddings = max(positions, args.seq_length)
        validate_args(args)
        args.max_position_embeddings = positions
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
    written = {name: getattr(args, name) for name in ("tensorboard_dir", "wandb_project")}
    if args.dry_run:
        vars(args).update(tensorboard_dir=None, wandb_project="")
    try:
        set_global_variables(args)
        vars(args).update(written)
    except (ValueError, AssertionError):
        raise
    except Exception as error:  # of TensorBoard's or wandb's, on the rank that writes
        exit_with_own_error(f"{type(error).__name__}: {error}")
    return args


def end_with(error: Exception) -> NoReturn:
    """End the run with one line for a mistake that every rank finds."""
    # Some of Megatron's assertions have no text: their own line says what was wrong.
    exit_with_error(" ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line)


def add_arguments(parser, rsa: RSAPlugin, settings: dict | None):
    """Megatron's extra_args_provider."""

    def raise_value_error(message: str):
        raise ValueError(message)

    parser.error = raise_value_error  # argparse would print the usage of all of Megatron's flags, on every rank
    megatron_patches.repair_help(parser)
    of_megatron = {group.title for group in parser._action_groups}
    add_flags(parser)
    rsa.add_arguments(parser)
    console.shorten_help(parser, ours={group.title for group in parser._action_groups} - of_megatron)
    # None where the command line has none: 0 turns off what the recipe says.
    known, unknown = parser.parse_known_args(namespace=argparse.Namespace(packing_buffer_size=None))
    if unknown:  # before what may follow from it
        raise ValueError(explain_unknown(parser, unknown, sys.argv[1:]))
    architecture = find_architecture(known.model)
    set_default_tokenizer(parser, known)
    settings = settings or recipe(known.model, known.stage)
    if known.packing_buffer_size == 0:
        settings = unpack(settings)
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
    if known.lr_warmup_iters or known.lr_warmup_samples:
        parser.set_defaults(lr_warmup_fraction=None)
    # (Recipes have an interval too.)
    parser.set_defaults(unused_save_interval=None if known.save else known.save_interval)
    known, _ = parser.parse_known_args()
    check_flags(parser, known)
    parser.set_defaults(**packing_arguments.make_defaults(known))
    multiple = max(1, known.make_vocab_size_divisible_by * known.tensor_model_parallel_size)
    parser.set_defaults(padded_vocab_size=-(-architecture.vocab_size // multiple) * multiple)
    # The plugin's settings are its config; its flags, parsed after this, override what the recipe says.
    rsa.config = dataclasses.replace(
        rsa.config, **{k.removeprefix("rsa_"): v for k, v in settings.items() if k.startswith("rsa_")}
    )
    return parser


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
    else:
        load_tokenizer(known)  # before Megatron does, whose words are about the Hugging Face Hub


def check_arguments(args) -> None:
    """What would otherwise fail later, on every rank, and in other words."""
    layer_specs(args.transformer_impl)
    learning_rates.check_arguments(args)
    mfu.check_arguments(args)
    architecture = architecture_of(args)
    packing_arguments.set_max_tiles(args, architecture)
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
    folder = getattr(args, named)
    if folder and not has_checkpoint(args):
        flag = f"--{named.replace('_', '-')}"
        remedy = f"rsa-megatron convert hf-to-megatron --hf {folder} --out MEGATRON makes one of it"
        raise ValueError(
            explain_hf_folder(f"{flag} ", folder, remedy)
            or f"{flag} {folder}: no {TRACKER} there; name the folder that --save or hf-to-megatron has written"
        )
    if get_rank() == 0:  # it reads the size of each file
        check_whole(args)
    check_model(args)


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


def dataloader_folder(checkpoint_folder: str) -> str:
    return str(Path(checkpoint_folder) / "dataloader")
