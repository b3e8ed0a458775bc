"""A training script in Megatron-LM's style, and the lines that add RSA to it: those that end in "# RSA", and no others.

    torchrun --nproc-per-node 2 examples/existing_jobs/megatron_lm.py --train-iters 20 --save runs/job

The rest is a job as a team has it, scaled down: a provider of megatron-core's LLaVAModel, a get_batch that broadcasts over the
tensor-parallel ranks, a loss function, and Megatron's pretrain(), whose flags all work. The data is noise.
"""

from copy import deepcopy
from functools import partial

import torch

from rsa_megatron import megatron_on_cpu

ON_CPU = megatron_on_cpu.enable()  # before megatron is imported; does nothing where there is a GPU
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from rsa_megatron import RSAConfig, RSAPlugin  # RSA
from rsa_megatron.models.layer_specs import LOCAL_ARGUMENTS
from rsa_megatron.training import megatron_patches

IMAGE_TOKEN, IMAGE_SIZE, PATCH_SIZE = 510, 32, 8
IMAGE_LENGTH = (IMAGE_SIZE // PATCH_SIZE) ** 2
rsa = RSAPlugin(RSAConfig(weight=0.01))  # RSA


@rsa.wrap_model_provider  # RSA
def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    language = config or core_transformer_config_from_args(args)
    vision, language_layer = deepcopy(language), decoder_model_with_local_default_spec()
    vision.pipeline_model_parallel_size, vision.vision_model_type = 1, "clip"
    return LLaVAModel(
        language,
        language_layer,
        args.padded_vocab_size,
        args.seq_length,
        vision,
        get_vit_layer_with_local_spec(),
        True,
        deepcopy(vision),
        get_submodules(language_layer.submodules.mlp),
        "mlp",
        pre_process=pre_process,
        post_process=post_process,
        add_encoder=pre_process,
        vp_stage=vp_stage,
        img_h=IMAGE_SIZE,
        img_w=IMAGE_SIZE,
        patch_dim=PATCH_SIZE,
        image_token_index=IMAGE_TOKEN,
        pg_collection=pg_collection,
    )


class Noise(torch.utils.data.Dataset):
    """An image and its caption: sample i is the same every time, and tells nothing."""

    def __init__(self, num_samples: int, length: int):
        self.num_samples, self.length = num_samples, length

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(index)
        text = torch.randint(IMAGE_TOKEN, (self.length,), generator=noise)
        image = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=noise)
        return {"tokens": torch.cat([torch.tensor([IMAGE_TOKEN]), text[:-1]]), "labels": text, "image": image}


def datasets_provider(num_samples, vp_stage=None):
    # An image takes one position of the text, and IMAGE_LENGTH of the row.
    return [Noise(number, get_args().seq_length - IMAGE_LENGTH + 1) if number else None for number in num_samples]


def get_batch(data_iterator):
    data = next(data_iterator) if data_iterator is not None else None
    text = tensor_parallel.broadcast_data(["tokens", "labels"], data, torch.int64)
    image = tensor_parallel.broadcast_data(["image"], data, torch.float32)
    return text["tokens"], text["labels"], image["image"]


def loss_func(loss_mask, output_tensor):
    loss = (output_tensor.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


@rsa.wrap_forward_step  # RSA
def forward_step(data_iterator, model):
    tokens, labels, images = get_batch(data_iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    output, loss_mask = model(images, tokens, positions, None, labels=labels, loss_mask=torch.ones_like(tokens).float())
    return output, partial(loss_func, loss_mask)


def add_arguments(parser):
    rsa.add_arguments(parser)  # RSA
    parser.set_defaults(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        seq_length=32,
        max_position_embeddings=32,
        micro_batch_size=4,
        global_batch_size=16,
        train_iters=5,
        lr=1e-3,
        log_interval=1,
        eval_iters=0,
        eval_interval=100,
        save_interval=100,
        num_workers=0,
        tokenizer_type="NullTokenizer",
        vocab_size=511,
        **LOCAL_ARGUMENTS,
        **(megatron_on_cpu.MEGATRON_ARGUMENTS if ON_CPU else {}),
    )
    return parser


def main():
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    megatron_patches.repair()  # of megatron-core as PyPI has it
    config = pretrain_cfg_container_from_args(args)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step, model_provider)


if __name__ == "__main__":
    main()
