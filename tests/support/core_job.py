"""A training job as a team may have it: Megatron-LM's style, megatron.core alone, and of RSA five lines in main().

It has what such scripts have: a model provider with add_encoder, a get_batch that broadcasts key by key, a forward step that
reaches through the wrappers around the model, a loss function in the form of three values or in the older one of two,
Megatron's DistributedDataParallel, schedules, optimizer and checkpoints. Runs with any megatron-core from 0.16 on.

    main(["--tower", "clip", "--rsa-weight", "1"], with_rsa=True)    in each process of a torch.distributed group
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.support.packed_attention import PackedAttention

VOCAB_SIZE, IMAGE_TOKEN, SEQUENCE_LENGTH, PACKED_LENGTH, NUM_MICRO_BATCHES = 128, 3, 96, 144, 2
IMAGE_SIZE, PATCH_SIZE = 56, 14  # 16 patches, 4 after pixel shuffle
TILE_TAGS = [[10 + tile] * 5 for tile in range(4)]  # five tokens before each tile, as NVLM has them

args: argparse.Namespace


def add_job_arguments(parser):
    parser.add_argument("--tower", default="clip", choices=("clip", "siglip", "internvit", "radio"))
    parser.add_argument("--keep-class-token", action="store_true")
    parser.add_argument("--pixel-shuffle", action="store_true")
    parser.add_argument("--tile-tags", action="store_true")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--packed", action="store_true", help="the samples of a micro-batch in one row")
    parser.add_argument("--bounds-at-the-ends", action="store_true", help="stages that read no text get no bounds")
    parser.add_argument("--train-iters", type=int, default=2)
    parser.add_argument("--loss-form", default="three", choices=("three", "per-token", "two"))
    parser.add_argument("--bf16", action="store_true")
    for folder in ("--load", "--save", "--save-gradients"):
        parser.add_argument(folder, type=Path)
    return parser


def model_provider(pre_process=True, post_process=True, add_encoder=True, add_decoder=True, parallel_output=True):
    language = transformer_config(hidden_size=32, num_layers=4, ffn_hidden_size=64)
    language.pipeline_model_parallel_size = args.pipeline_model_parallel_size
    language.pipeline_dtype = language.params_dtype
    vision = transformer_config(hidden_size=48, num_layers=2, ffn_hidden_size=64)
    vision.vision_model_type = args.tower
    projection = transformer_config(hidden_size=32, num_layers=1, ffn_hidden_size=64)
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=decoder_layer_spec(),
        language_vocab_size=VOCAB_SIZE,
        language_max_sequence_length=PACKED_LENGTH if args.packed else SEQUENCE_LENGTH,
        language_position_embedding_type="rope",
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=args.tower != "siglip" and not args.keep_class_token,
        vision_projection_config=projection,
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        parallel_output=parallel_output,
        pre_process=pre_process,
        post_process=post_process,
        add_encoder=add_encoder,
        add_decoder=add_decoder,
        img_h=IMAGE_SIZE,
        img_w=IMAGE_SIZE,
        patch_dim=PATCH_SIZE,
        image_token_index=IMAGE_TOKEN,
        pixel_shuffle=args.pixel_shuffle,
        tile_tags=TILE_TAGS if args.tile_tags else None,
        max_num_tiles=len(TILE_TAGS) - 1,
        tokenizer_type="qwen2p5",
    )
    if add_encoder and args.tower == "radio":
        model.vision_model.eval()  # in training it crops its positions at random, differently on each rank
    return model


def decoder_layer_spec():
    spec = get_gpt_layer_local_spec()
    if args.packed:
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def transformer_config(**sizes) -> TransformerConfig:
    return TransformerConfig(
        num_attention_heads=4,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        calculate_per_token_loss=args.loss_form == "per-token",
        use_cpu_initialization=True,
        init_method_std=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        **sizes,
    )


def get_batch(data_iterator):
    """The batch on every rank that needs it: read on tensor-parallel rank 0 of the first and the last stage.

    Where samples are packed into one row every stage must know where each begins.
    """
    is_end = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    if not is_end and (not args.packed or args.bounds_at_the_ends):
        return [None] * 6
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    data = next(data_iterator) if reads else None
    packed = None
    if args.packed:
        bounds = tensor_parallel.broadcast_data(["bounds"], data, torch.int32)["bounds"]
        longest = int(bounds.diff().max())
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    if not is_end:
        return [None] * 5 + [packed]
    tokens = tensor_parallel.broadcast_data(["tokens"], data, torch.int64)["tokens"]
    labels = tensor_parallel.broadcast_data(["labels"], data, torch.int64)["labels"]
    loss_mask = tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)["loss_mask"]
    images = tensor_parallel.broadcast_data(["imgs"], data, torch.float32)["imgs"]
    num_tiles = tensor_parallel.broadcast_data(["num_tiles"], data, torch.int32)["num_tiles"]
    if not parallel_state.is_pipeline_first_stage():
        images = None
    return tokens, labels, loss_mask, images, num_tiles, packed


def loss_func(loss_mask, output_tensor):
    """The sum over tokens, their number, and both for the log; in the older form the mean, and a figure that is one already."""
    losses, mask = output_tensor.float(), loss_mask.reshape(-1)
    loss, num_tokens = torch.sum(losses.reshape(-1) * mask), mask.sum().int()
    if args.loss_form == "two":
        return loss / num_tokens.clamp(min=1), {"lm loss": loss.detach() / num_tokens.clamp(min=1)}
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model):
    tokens, labels, loss_mask, images, num_tiles, packed = get_batch(data_iterator)
    assert unwrap(model).image_token_index == IMAGE_TOKEN
    position_ids = None if tokens is None else torch.arange(tokens.shape[1]).expand_as(tokens)
    output, loss_mask = model(
        images, tokens, position_ids, None, labels, loss_mask, num_image_tiles=num_tiles, packed_seq_params=packed
    )
    return output, partial(loss_func, loss_mask)


def micro_batch(iteration: int, index: int, rank: int) -> dict[str, torch.Tensor]:
    """A data-parallel rank's part of a micro-batch: one image and a caption; in each four also a text and two images."""
    generator = torch.Generator().manual_seed(1000 * iteration + 100 * index + rank)
    size, length, tokens, loss_mask, num_tiles = args.micro_batch_size, 18, [], [], []
    for sample in range(size):
        row = torch.randint(20, VOCAB_SIZE, (length + 1,), generator=generator)
        places = ([1], [2], [], [1, 6])[sample % 4] if size > 1 else [1]
        row[places] = IMAGE_TOKEN
        num_tiles += [1 + (sample + rank + index + iteration + place) % 3 for place in places]
        tokens.append(row)
        # The answer begins after a prompt and ends before the row does.
        start, end = 8 + sample % 2, 15 + (sample + rank) % 3
        loss_mask.append(((torch.arange(length) >= start) & (torch.arange(length) < end)).float())
    tokens = torch.stack(tokens)
    images = torch.randn(sum(num_tiles), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.stack(loss_mask),
        "imgs": images,
        "num_tiles": torch.tensor(num_tiles, dtype=torch.int32),
    }


def in_one_row(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The samples of a micro-batch one after another, and where each begins once its images are put in.

    Under pipeline parallelism LLaVAModel fills the row up: what follows the samples is one more sequence.
    """
    tokens_per_tile = 4 if args.pixel_shuffle else 16
    tiles, lengths = rows["num_tiles"].tolist(), []
    for row in rows["tokens"].tolist():
        lengths.append(sum(tokens_per_tile * tiles.pop(0) if token == IMAGE_TOKEN else 1 for token in row))
    if args.pipeline_model_parallel_size > 1:
        lengths.append(PACKED_LENGTH - sum(lengths))
        assert lengths[-1] > 0
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return rows | {name: rows[name].reshape(1, -1) for name in ("tokens", "labels", "loss_mask")} | {"bounds": bounds}


def train_step(forward_step, model, optimizer, iteration: int) -> dict[str, float]:
    data_rank = parallel_state.get_data_parallel_rank()
    batches = [micro_batch(iteration, index, data_rank) for index in range(NUM_MICRO_BATCHES)]
    batches = list(map(in_one_row, batches)) if args.packed else batches
    length = PACKED_LENGTH if args.packed else SEQUENCE_LENGTH
    model.zero_grad_buffer()
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=NUM_MICRO_BATCHES,
        seq_length=length,
        micro_batch_size=1 if args.packed else args.micro_batch_size,
        decoder_seq_length=length,
        forward_only=False,
    )
    if iteration == 0 and args.save_gradients:
        save_gradients(args.save_gradients, unwrap(model), lambda parameter: parameter.main_grad)
    optimizer.step()
    return {name: figure(name, reports) for name in reports[0]} if reports else {}


def figure(name: str, reports: list[dict[str, torch.Tensor]]) -> float:
    """As Megatron's training loop makes it: of pairs the sums over micro-batches and ranks; else a mean over micro-batches."""
    values = torch.stack([report[name].float() for report in reports])
    if values[0].numel() == 1:
        return values.mean().item()
    total = values.sum(dim=0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return (total[0] / total[1]).item()


def initialize() -> None:
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(provider):
    """The model in its wrappers, and the optimizer."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = provider(pre_process=first, post_process=last, add_encoder=first, add_decoder=True)
    if args.load:
        state = {"model": model.sharded_state_dict()}
        model.load_state_dict(dist_checkpointing.load(state, args.load)["model"])
    model.model_type = ModelType.encoder_or_decoder
    config = model.config
    wrapped = Float16Module(config, model) if args.bf16 else model
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), wrapped)
    # Adam divides by the gradient's size: with a small eps rounding would decide where a gradient is zero.
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.0, clip_grad=0.0, adam_eps=1e-2, bf16=args.bf16
    )
    settings.params_dtype = config.params_dtype
    optimizer = get_megatron_optimizer(settings, [wrapped])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped, optimizer


def unwrap(model) -> LLaVAModel:
    return model.module.module if args.bf16 else model.module


def save(folder: Path, model: LLaVAModel, optimizer=None) -> None:
    state = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"])
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, folder)


def save_gradients(folder: Path, model: LLaVAModel, gradient_of) -> None:
    """A checkpoint that holds each parameter's gradient in the parameter's place."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in kept:
        parameter.data = gradient_of(parameter).clone()
    save(folder, model)
    for parameter, data in kept.items():
        parameter.data = data


def main(argv: list[str], with_rsa: bool = False) -> list[dict[str, float]]:
    """Train; the figures of each iteration, on the last pipeline stage."""
    global args
    provider, step, extra_arguments = model_provider, forward_step, add_job_arguments
    if with_rsa:
        from rsa_megatron import RSAPlugin

        rsa = RSAPlugin()
        provider, step = rsa.wrap_model_provider(model_provider), rsa.wrap_forward_step(forward_step)

        def extra_arguments(parser):
            return rsa.add_arguments(add_job_arguments(parser))

    args = extra_arguments(argparse.ArgumentParser()).parse_args(argv)
    initialize()
    model, optimizer = build(provider)
    figures = [train_step(step, model, optimizer, iteration) for iteration in range(args.train_iters)]
    if args.save:
        save(args.save, unwrap(model), optimizer)
    return figures
