"""Train a LLaVA model with the RSA loss, on Megatron's own pretrain().

    torchrun --nproc-per-node 2 examples/pretrain_llava_rsa.py --model demo --stage 1 \
        --data-path demo/data/captions --tokenizer-model demo/tokenizer --pretrained-checkpoint demo/parts

--model and --stage set Megatron's arguments; every Megatron flag still works and overrides them. --dry-run prints
what would run and stops. Without a CUDA device the same script runs on the CPU.
"""

import dataclasses
import functools
import math
import os
import platform
import sys
import traceback
from pathlib import Path

from rsa_megatron import megatron_on_cpu

try:
    ON_CPU = megatron_on_cpu.enable()  # before megatron is imported: its modules look for CUDA as they load
except RuntimeError as error:
    sys.exit(f"error: {error}")

import megatron_repairs
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.energon import WorkerConfig
from megatron.training import get_args, get_tokenizer, get_wandb_writer, pretrain, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import is_last_rank, print_rank_last
from transformers import AutoTokenizer

from recipes import recipe
from rsa_megatron.data.conversation import IMAGE_TOKEN, TEMPLATES, check_tokenizer
from rsa_megatron.data.loaders import TrainLoader, ValidationLoader, check_data, find_train_state
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from rsa_megatron.data.tiles import ASPECT_RATIOS
from rsa_megatron.huggingface import find_architecture, is_model_folder, read_architecture
from rsa_megatron.huggingface_files import copy_model_files, write_chat_template, write_model_files
from rsa_megatron.llava.architectures import Architecture
from rsa_megatron.llava.layer_specs import LOCAL_ARGUMENTS, layer_specs
from rsa_megatron.llava.measure import measure_mutual_knn
from rsa_megatron.llava.model import PARTS, LlavaOneVision, set_trainable
from rsa_megatron.llava.train_step import forward_step
from rsa_megatron.plugin import RSAPlugin


def main():
    rsa = RSAPlugin()
    args = parse(rsa)
    if args.dry_run:
        return dry_run(args, rsa)
    megatron_repairs.repair()
    try:
        write_hugging_face_files(args)
    except (ValueError, OSError) as error:
        end_with(error)
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        rsa.wrap_forward_step(forward_step),
        rsa.wrap_model_provider(model_provider),
        non_loss_data_func=functools.partial(mutual_knn, rsa=rsa) if args.mutual_knn_samples else None,
        process_non_loss_data_func=write_mutual_knn if args.mutual_knn_samples else None,
    )


def parse(rsa: RSAPlugin, settings: dict | None = None):
    """The run's arguments: Megatron's, ours and the plugin's, with `settings` or else --stage's as their defaults."""
    try:
        provider = functools.partial(add_arguments, rsa=rsa, settings=settings)
        args = parse_and_validate_args(extra_args_provider=provider)
        check_arguments(args)
    except (ValueError, AssertionError, OSError) as error:
        end_with(error)
    if args.virtual_pipeline_model_parallel_size:
        print_rank_0("WARNING: megatron-core cannot save the data position of interleaved pipelines; "
                     "a resumed run will need --restart-data")  # fmt: skip
    elif args.save:
        args.dataloader_save = dataloader_folder(args.save)
    if "language" not in args.trainable and not (args.pretrained_checkpoint or args.load):
        print_rank_0("WARNING: the language model is frozen and no checkpoint is named: it stays as it is drawn at random")
    return args


def end_with(error: Exception):
    """One line from each node, and the exit status of a wrong command line."""
    # Some of Megatron's assertions say nothing: their own line says what was wrong.
    message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {message}", file=sys.stderr)
    elif int(os.environ.get("LOCAL_RANK", "0")) == 0:
        # A node may fail where the first one does not.
        print(f"error on {platform.node()}: {message}", file=sys.stderr)
    sys.exit(2)


def raise_value_error(message: str):
    raise ValueError(message)


def add_arguments(parser, rsa: RSAPlugin, settings: dict | None):
    """Megatron's extra_args_provider."""
    parser.error = raise_value_error  # argparse would print the usage of all of Megatron's flags, on every rank
    megatron_repairs.repair_help(parser)
    group = parser.add_argument_group("LLaVA with RSA")
    group.add_argument("--model", default="demo",
                       help="architecture, or a Hugging Face folder; sets the model's Megatron arguments")  # fmt: skip
    group.add_argument("--stage", default="1", help="training stage; sets the run's Megatron arguments")
    group.add_argument("--trainable", nargs="+", choices=list(PARTS), help="parts that learn; the others are frozen")
    group.add_argument("--template", choices=TEMPLATES, help="how a conversation becomes tokens")
    group.add_argument("--image-aspect-ratio", choices=ASPECT_RATIOS,
                       help="square: an image is squashed into one tile; anyres: a base tile and a grid of tiles")  # fmt: skip
    group.add_argument("--shuffle-buffer-size", type=int, default=1000, help="Energon's, in samples")
    group.add_argument("--mutual-knn-samples", type=int, default=1000,
                       help="validation pairs for mutual-knn at each evaluation; 0: none")  # fmt: skip
    group.add_argument("--mutual-knn-k", type=int, default=10, help="neighbours")
    group.add_argument("--restart-data", action="store_true",
                       help="resume from a checkpoint with the data from its beginning")  # fmt: skip
    group.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    rsa.add_arguments(parser)
    known, _ = parser.parse_known_args()
    architecture = find_architecture(known.model)
    settings = settings or recipe(known.model, known.stage)
    parser.set_defaults(
        **architecture.megatron_defaults(),
        **settings,
        **(LOCAL_ARGUMENTS if ON_CPU or not HAVE_TE else {}),
        **(megatron_on_cpu.MEGATRON_ARGUMENTS if ON_CPU else {}),
        tokenizer_type="HuggingFaceTokenizer",
        dataloader_type="external",
        split="1,0,0",  # Energon's own splits count; this silences Megatron's
    )
    known, _ = parser.parse_known_args()
    multiple = known.make_vocab_size_divisible_by * known.tensor_model_parallel_size
    parser.set_defaults(padded_vocab_size=-(-architecture.vocab_size // multiple) * multiple)
    # The plugin's settings are its config; its flags, parsed after this, override what the recipe says.
    rsa.config = dataclasses.replace(rsa.config, **{k.removeprefix("rsa_"): v for k, v in settings.items() if k.startswith("rsa_")})
    return parser


def check_arguments(args) -> None:
    """What would otherwise fail later, on every rank, and in other words."""
    layer_specs(args.transformer_impl)
    architecture_of(args).check_layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        chunks=args.virtual_pipeline_model_parallel_size or 1,
    )
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
    for flag in ("full_validation", "iterations_to_skip", "sft"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} does not go with this script's data; leave it out")
    if not (args.train_iters or args.train_samples or args.skip_train or args.dry_run):
        raise ValueError("--train-iters is missing: how many steps of --global-batch-size samples to train")
    tracker = "latest_checkpointed_iteration.txt"
    found = [Path(folder, tracker).is_file() for folder in (args.load, args.pretrained_checkpoint) if folder]
    if args.pretrained_checkpoint and not any(found):
        raise ValueError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint}: no {tracker} there; name the "
            "folder that --save or hf-to-megatron has written"
        )
    if not args.data_path:
        raise ValueError("--data-path is missing: name a prepared Energon data set or a mixture (.yaml)")
    if len(args.data_path) > 1:
        raise ValueError(f"--data-path takes one data set, not {len(args.data_path)}: name a mixture (.yaml) of them")
    check_model(args)
    if int(os.environ.get("RANK", "0")) == 0:
        check_data(
            args.data_path[0],
            (["train"] if not args.skip_train else []) + (["val"] if args.eval_iters else []),
            num_readers=args.data_parallel_size * max(1, args.num_workers),
            micro_batch_size=args.eval_micro_batch_size,
        )


def check_model(args) -> None:
    """That flags, tokenizer and --model go together, and with what an export will say of them."""
    architecture, tokenizer = architecture_of(args), load_tokenizer(args)
    check_tokenizer(tokenizer, args.template)
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer {args.tokenizer_model} has {len(tokenizer)} ids, --model {args.model} {architecture.vocab_size} "
            "word embeddings: name the tokenizer that the model was made for"
        )
    if args.rotary_percent != 1 or args.kv_channels != args.hidden_size // args.num_attention_heads:
        raise ValueError("--rotary-percent and --kv-channels: the model is a Qwen2, which has neither; leave them out")
    if not is_model_folder(args.model):
        return
    if architecture != find_architecture(args.model):
        raise ValueError(f"--model {args.model}: its sizes are those of its config.json; leave out the flags that change them")
    if AutoTokenizer.from_pretrained(args.model).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model} has other ids than the tokenizer in --model {args.model}: name that one"
        )


def architecture_of(args) -> Architecture:
    return find_architecture(args.model).with_arguments(vars(args))


def dry_run(args, rsa: RSAPlugin) -> None:
    """Print the settings (Megatron has printed its own), the parameters of each part, and which learn."""
    architecture = architecture_of(args)
    print_rank_0(f"\nmodel {args.model}, stage {args.stage}, {rsa.config}")
    print_rank_0(f"kernel size N: up to {args.micro_batch_size * args.data_parallel_size} pairs a micro-batch")
    print_rank_0(f"{'part':<12}{'parameters':>16}  learns  of which")
    counts = architecture.parameter_counts()
    for part, pieces in counts.items():
        listed = ", ".join(f"{piece} {count:,}" for piece, count in pieces.items())
        learns = "yes" if part in args.trainable else "no"
        print_rank_0(f"{part:<12}{sum(pieces.values()):>16,}  {learns:<6}  {listed}")
    totals = {part: sum(pieces.values()) for part, pieces in counts.items()}
    learn = sum(total for part, total in totals.items() if part in args.trainable)
    print_rank_0(f"{'all':<12}{sum(totals.values()):>16,}  {learn:,} learn")
    padding = args.padded_vocab_size - architecture.vocab_size
    print_rank_0(f"word embeddings: {architecture.vocab_size:,} rows, and {padding:,} of padding, which are not counted")


def write_hugging_face_files(args) -> None:
    """Beside the checkpoints, what `checkpoint_conversion megatron-to-hf` needs to know of the model."""
    if not args.save or int(os.environ.get("RANK", "0")) != 0:
        return
    architecture, folder = architecture_of(args), Path(args.save) / "hf"
    if folder.exists():
        if dataclasses.replace(read_architecture(folder), name=architecture.name) != architecture:
            raise ValueError(f"{folder} is of another model than this run's: name another --save, or remove it")
        return
    unfinished = Path(args.save) / "hf.unfinished"
    if is_model_folder(args.model):
        copy_model_files(Path(args.model), unfinished)
    else:
        # A tokenizer of its own: it may be given a token that the one in use must not have.
        write_model_files(unfinished, architecture, AutoTokenizer.from_pretrained(args.tokenizer_model))
    if args.template == "chat":
        write_chat_template(unfinished)
    unfinished.rename(folder)


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """Megatron's model provider: one chunk of the model."""
    args = get_args()
    model = LlavaOneVision(
        architecture_of(args),
        config or core_transformer_config_from_args(args),
        padded_vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        image_token_index=load_tokenizer(args).convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        rotary_base=args.rotary_base,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    set_trainable(model, args.trainable)
    return model


@functools.cache
def _tokenizer(path: str):
    return AutoTokenizer.from_pretrained(path)


def load_tokenizer(args):
    """The Hugging Face tokenizer; Megatron's own wrapper of it hides the special tokens."""
    return _tokenizer(args.tokenizer_model)


def datasets_provider(num_samples, vp_stage=None):
    """Megatron's data provider: loaders on the first tensor rank of the first and the last stage."""
    args = get_args()
    is_first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if mpu.get_tensor_model_parallel_rank() != 0 or not (is_first or is_last):
        return None, None, None
    train = None
    if not args.skip_train:
        train = TrainLoader(
            args.data_path[0],
            task_encoder(args, say_skipped=is_last, image_aspect_ratio=args.image_aspect_ratio),
            worker_config(args),
            args.micro_batch_size,
            args.shuffle_buffer_size,
        )
        if args.iteration > 0 and not args.restart_data:
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            try:
                train.restore_state(find_train_state(dataloader_folder(args.load), args.iteration, rank, size))
            except (ValueError, OSError) as error:
                end_with(error)
    validation = None
    if args.eval_iters:
        validation = validation_loader(args, say_skipped=is_last, image_aspect_ratio=args.image_aspect_ratio)
    return train, validation, None


datasets_provider.is_distributed = True


def validation_loader(args, *, say_skipped: bool, image_aspect_ratio: str) -> ValidationLoader:
    encoder = task_encoder(args, say_skipped=say_skipped, image_aspect_ratio=image_aspect_ratio)
    return ValidationLoader(args.data_path[0], encoder, worker_config(args), args.eval_micro_batch_size)


def task_encoder(args, *, say_skipped: bool, image_aspect_ratio: str) -> LlavaTaskEncoder:
    architecture = architecture_of(args)
    return LlavaTaskEncoder(
        load_tokenizer(args),
        image_size=architecture.vision.image_size,
        patch_size=architecture.vision.patch_size,
        image_aspect_ratio=image_aspect_ratio,
        grid_pinpoints=architecture.grid_pinpoints,
        max_tiles=architecture.max_tiles,
        max_sequence_length=args.seq_length,
        template=args.template,
        say_skipped=say_skipped,
    )


def worker_config(args) -> WorkerConfig:
    return WorkerConfig(
        rank=mpu.get_data_parallel_rank(),
        world_size=mpu.get_data_parallel_world_size(),
        num_workers=args.num_workers,
        data_parallel_group=mpu.get_data_parallel_group(),
        seed_offset=args.seed,
    )


def dataloader_folder(checkpoint_folder: str) -> str:
    return str(Path(checkpoint_folder) / "dataloader")


def mutual_knn(model, *, rsa: RSAPlugin) -> dict[str, float]:
    """For Megatron's non_loss_data_func: at each evaluation, image alone against caption alone on validation pairs."""
    args = get_args()
    reads = mpu.get_tensor_model_parallel_rank() == 0 and (
        mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
    )
    result = measure_mutual_knn(
        model,
        # Base tiles alone are measured; with anyres the others would be cut for nothing.
        validation_loader(args, say_skipped=False, image_aspect_ratio="square").one_pass() if reads else None,
        num_samples=args.mutual_knn_samples,
        micro_batch_size=args.eval_micro_batch_size,
        seq_length=args.seq_length,
        k=args.mutual_knn_k,
        base_tile=rsa.config.base_tile,
    )
    if result is None:
        return {}
    score, num_pairs = result
    # args.iteration is that of the checkpoint; where nothing is left to train, the current one stays 0.
    iteration = args.iteration if args.skip_train else max(args.iteration, args.curr_iteration + 1)
    chance = args.mutual_knn_k / (num_pairs - 1) if num_pairs > 1 else math.nan
    print_rank_last(
        f" validation mutual-knn@{args.mutual_knn_k} at iteration {iteration} | mutual-knn value: {score:.4f} | "
        f"{num_pairs} pairs, image alone against caption alone | chance {chance:.4f} |"
    )
    return {"mutual-knn": score}


def write_mutual_knn(scores: dict[str, float], iteration: int, writer) -> None:
    """Megatron's process_non_loss_data_func: to TensorBoard and, where it is on, wandb."""
    for key, score in scores.items():
        writer.add_scalar(f"{key} validation", score, iteration)
        if get_wandb_writer() and is_last_rank():
            get_wandb_writer().log({f"{key} validation": score}, iteration)


if __name__ == "__main__":
    main()
