"""The same LLaVA-OneVision trained by transformers with plain PyTorch, and by Megatron as here: tokens a second.

    python benchmarks/against_huggingface.py [--model demo] [--threads 2] [--append results/benchmarks.jsonl]
    python benchmarks/against_huggingface.py --model llava-ov-0.5b --batch-size 8 --text-tokens 256 --device cuda

Both sides have the same random weights (written by transformers, converted by checkpoint_conversion), the same batch (an
image of two tiles and a text in each row, no padding) and the same parts that learn. A step is what each trains with, from
zeroed gradients to the loss as a number:
    transformers   LlavaOnevisionForConditionalGeneration with sdpa attention, backward, clipping of the gradient's norm,
                   torch.optim.AdamW as PyTorch has it by default (with --fused in its fused form, as transformers' own
                   Trainer asks for it)
    megatron       megatron.training's train_step with the training script's forward step, RSA off, and the optimizer that
                   Megatron's flags make: DDP's gradient buffers, clipping, AdamW (PyTorch's own, where there is neither
                   Transformer Engine nor apex)
On a GPU weights are bf16: transformers' AdamW then works in bf16, Megatron's on fp32 copies. Each side is a process of its
own, as Megatron without CUDA stands in for parts of torch; they take turns, one waiting while the other works. Losses of
the first step must be equal before anything is timed; the figure is the median, over pairs of turns, of the ratio.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from rsa_megatron.anyres import ImageLayout
from rsa_megatron.models.architectures import ARCHITECTURES, Architecture, get_architecture
from rsa_megatron.planning.flops import training_flops

PARTS = ("vision", "projector", "embeddings", "language")
#: Relative differences of the first step's losses, means over some hundred tokens. fp32: roundings of 6e-8 through the layers
#: add up to some 1e-6. bf16: a rounding is 4e-3, and errors of single tokens average out.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0


def main():
    args = parse()
    torch.set_num_threads(args.threads)  # of the GEMM rate; the sides' processes have as many
    about = machine.description(torch.device(args.device), args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_models(Path(folder), args)
        figures = measure(Path(folder), args)
    tokens, part = figures["tokens_per_s"], figures["gemm_part"]
    print(about)
    low, high = figures["quartiles"]
    print(
        "| model | rows x positions | tokens/s, ours | transformers | ours over theirs | quartiles | "
        "part of GEMM rate, ours | transformers |"
    )
    print("| --- " * 8 + "|")
    print(
        f"| {args.model} | {args.batch_size} x {figures['positions']} | {tokens['megatron']:.0f} | "
        f"{tokens['transformers']:.0f} | {figures['ratio']:.3f} | {low:.3f} to {high:.3f} | "
        f"{part['megatron']:.2f} | {part['transformers']:.2f} |"
    )
    machine.append(args.append, "against_huggingface", about, figures)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=ARCHITECTURES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--text-tokens", type=int, default=64, help="of each row, beside its image's")
    parser.add_argument("--trainable", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fused", action="store_true", help="give transformers' side the fused AdamW")
    parser.add_argument("--turns", type=int, default=15, help="of each side, after one that is not counted")
    parser.add_argument("--steps", type=int, default=3, help="of each turn")
    parser.add_argument("--folder", type=Path, help="where weights are written for the while; three times the model")
    return machine.add_arguments(parser).parse_args()


def dtype_of(args) -> torch.dtype:
    return torch.bfloat16 if args.device == "cuda" else torch.float32


def write_models(folder: Path, args) -> None:
    """Random weights as transformers draws them, in its format (folder/hf) and as a Megatron checkpoint (folder/megatron)."""
    from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

    from checkpoint_conversion.__main__ import main as convert
    from rsa_megatron.data.synthetic.tokenizer import train_tokenizer
    from rsa_megatron.models.hf_files import write_model_files

    write_model_files(
        folder / "hf", get_architecture(args.model), train_tokenizer(["a red boat"], folder / "tokenizer")
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(AutoConfig.from_pretrained(folder / "hf"))
    model.to(dtype_of(args)).save_pretrained(folder / "hf")
    convert(["hf-to-megatron", "--hf", str(folder / "hf"), "--out", str(folder / "megatron")])


@dataclass
class Batch:
    """Shapes: B rows, S tokens of text, s side of a tile in pixels."""

    #: [B, 2, 3, s, s] float32: the base tile and a grid of one
    tiles: Tensor
    #: [B, S] int64
    text: Tensor
    layout: ImageLayout
    num_image_tokens: int

    @property
    def num_positions(self) -> int:
        return self.num_image_tokens + self.text.shape[1]


def make_batch(architecture: Architecture, args) -> Batch:
    """The same on both sides."""
    vision, generator = architecture.vision, torch.Generator().manual_seed(1)
    layout = ImageLayout(vision.image_size, vision.image_size, 1, 1)
    tiles = torch.randn(args.batch_size, 2, 3, vision.image_size, vision.image_size, generator=generator)
    # Below 10 are special tokens, above 1023 none of the tokenizer's.
    text = torch.randint(10, 1024, (args.batch_size, args.text_tokens), generator=generator)
    return Batch(tiles, text, layout, layout.num_tokens(vision.tokens_per_side, architecture.max_tiles))


def transformers_step(folder: Path, args):
    """A function that trains one step and returns its loss."""
    from transformers import LlavaOnevisionForConditionalGeneration

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder / "hf", dtype=dtype_of(args), attn_implementation="sdpa"
    )
    model.to(args.device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part_in_transformers(name) in args.trainable
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=WEIGHT_DECAY, fused=args.fused or None)
    batch = make_batch(get_architecture(args.model), args)
    image = torch.full((args.batch_size, batch.num_image_tokens), model.config.image_token_id)
    labels = torch.cat([torch.full_like(image, -100), batch.text], dim=1)
    inputs = dict(
        input_ids=torch.cat([image, batch.text], dim=1).to(args.device),
        labels=labels.to(args.device),
        pixel_values=batch.tiles.to(args.device, dtype_of(args)),
        image_sizes=torch.tensor([[batch.layout.height, batch.layout.width]] * args.batch_size).to(args.device),
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        return loss.item()

    return step


def part_in_transformers(name: str) -> str:
    beginnings = {
        "model.vision_tower.": "vision",
        "model.multi_modal_projector.": "projector",
        "model.image_newline": "projector",
        "model.language_model.embed_tokens.": "embeddings",
    }
    return next((part for beginning, part in beginnings.items() if name.startswith(beginning)), "language")


def megatron_step(folder: Path, args):
    """A function that trains one step and returns its loss."""
    architecture = get_architecture(args.model)
    batch = make_batch(architecture, args)
    settings = dict(
        trainable=args.trainable,
        template="plain",
        image_aspect_ratio="anyres",
        seq_length=batch.num_positions,
        micro_batch_size=args.batch_size,
        global_batch_size=args.batch_size,
        train_iters=1_000_000,
        eval_iters=0,
        mutual_knn_samples=0,
        num_workers=0,
        lr=RATE,
        min_lr=RATE,
        lr_decay_style="constant",
        weight_decay=WEIGHT_DECAY,
        clip_grad=CLIP,
        adam_beta2=0.999,
    )
    hf = str(folder / "megatron" / "hf")
    sys.argv = [
        "against_huggingface.py",
        "--model",
        hf,
        "--tokenizer-model",
        hf,
        "--rsa-weight",
        "0",
        "--pretrained-checkpoint",
        str(folder / "megatron"),
    ]
    sys.argv += ["--bf16"] if args.device == "cuda" else []
    from rsa_megatron.training import arguments, megatron_patches, providers  # isort: skip  # before Megatron
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer, train_step

    from rsa_megatron.plugin import RSAPlugin
    from rsa_megatron.training.train_step import forward_step

    megatron_args = arguments.parse(RSAPlugin(), settings, reads_data=False)
    megatron_patches.repair()
    initialize_megatron()
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        model_provider_func=providers.model_provider,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(megatron_args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config = get_model_config(model[0])
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    model[0].train()
    stored = as_stored(batch, arguments.load_tokenizer(megatron_args).convert_tokens_to_ids("<image>"))
    endless = RerunDataIterator(iter(lambda: stored, None))

    def step() -> float:
        figures, *_ = train_step(
            forward_step, endless, model, optimizer, scheduler, config, get_forward_backward_func(), iteration=0
        )
        return figures["lm loss"].item()

    return step


def as_stored(batch: Batch, image_token: int):
    """As the training data's loader would give it."""
    from rsa_megatron.batch import LlavaBatch, RSASamples

    num_rows, num_tokens = batch.text.shape
    tokens = torch.cat([torch.full((num_rows, 1), image_token), batch.text], dim=1)
    # transformers takes the last token as an input, too, and learns nothing from it.
    labels = torch.cat([batch.text, torch.zeros_like(batch.text[:, :1])], dim=1)
    per_row = torch.full((num_rows,), batch.num_positions)
    return LlavaBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=(torch.arange(num_tokens + 1) < num_tokens).float().repeat(num_rows, 1),
        images=batch.tiles.flatten(0, 1),
        image_layouts=torch.tensor([batch.layout.as_numbers()] * num_rows),
        row_lengths=per_row,
        rsa=RSASamples(*map(torch.zeros_like, (per_row, tokens, per_row, per_row))),  # no sample takes part
        keys=[str(row) for row in range(num_rows)],
        records=[{}] * num_rows,
    )


SIDES = {"megatron": megatron_step, "transformers": transformers_step}


def serve(connection, side: str, folder: Path, args) -> None:
    """One side's process: N steps at each request, 0 to end; their mean time in seconds, and the first one's loss."""
    torch.set_num_threads(args.threads)
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # Megatron prints a thousand arguments; errors go to stderr
    step, device = SIDES[side](folder, args), torch.device(args.device)
    while num_steps := connection.recv():
        machine.synchronize(device)
        begin = time.perf_counter()
        losses = [step() for _ in range(num_steps)]
        machine.synchronize(device)
        connection.send(((time.perf_counter() - begin) / num_steps, losses[0]))


def measure(folder: Path, args) -> dict:
    os.environ |= {
        "OMP_NUM_THREADS": str(args.threads),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    context, connections, processes = multiprocessing.get_context("spawn"), {}, []
    for side in SIDES:
        connections[side], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, side, folder, args), daemon=True))
        processes[-1].start()
        theirs.close()  # so that its end is seen here
    try:
        figures = compare(connections, args)
        for connection in connections.values():
            connection.send(0)
        for process in processes:
            process.join()
        return figures
    except EOFError:
        raise SystemExit("error: a side ended early; see its output above") from None
    finally:
        for process in processes:
            process.kill()


def compare(connections: dict, args) -> dict:
    def turn(side: str, num_steps: int) -> tuple[float, float]:
        connections[side].send(num_steps)
        return connections[side].recv()

    first = {side: turn(side, 1)[1] for side in SIDES}
    difference = abs(first["megatron"] / first["transformers"] - 1)
    if not difference < LOSS_TOLERANCE[dtype_of(args)]:
        raise SystemExit(f"error: the first losses differ by {difference:.1e}, so that the two are not alike: {first}")
    times, gemm = {side: [] for side in SIDES}, []
    for number in range(args.turns + 1):
        for side in list(SIDES)[:: 1 if number % 2 else -1]:
            times[side].append(turn(side, args.steps)[0])
        gemm.append(machine.gemm_rate(torch.device(args.device), dtype=dtype_of(args)))
    times = {side: seconds[1:] for side, seconds in times.items()}
    ratios = [theirs / ours for ours, theirs in zip(times["megatron"], times["transformers"])]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    batch = make_batch(get_architecture(args.model), args)
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    return dict(
        model=args.model,
        dtype=str(dtype_of(args)).removeprefix("torch."),
        trainable=args.trainable,
        fused=args.fused,
        batch_size=args.batch_size,
        positions=batch.num_positions,
        first_loss=first,
        seconds=medians,
        tokens_per_s={side: args.batch_size * batch.num_positions / seconds for side, seconds in medians.items()},
        ratio=statistics.median(ratios),
        quartiles=[quartiles[0], quartiles[2]],
        gemm_part={
            side: flops(batch, args) / seconds / statistics.median(gemm[1:]) for side, seconds in medians.items()
        },
    )


def flops(batch: Batch, args) -> float:
    """Model FLOPs of a step."""
    architecture = get_architecture(args.model)
    num_tiles = batch.tiles.shape[0] * batch.tiles.shape[1]
    return sum(
        training_flops(
            architecture,
            args.trainable,
            num_tiles=num_tiles,
            num_positions=args.batch_size * batch.num_positions,
            squared_lengths=args.batch_size * batch.num_positions**2,
            num_image_tokens=num_tiles * architecture.vision.tokens_per_side**2,
        ).values()
    )


if __name__ == "__main__":
    main()
