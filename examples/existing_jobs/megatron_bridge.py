"""A Megatron-Bridge job, and the lines that add RSA to it: those that end in "# RSA", and no others.

    torchrun --nproc-per-node 2 examples/existing_jobs/megatron_bridge.py

The job is a small one of its own: a provider that builds megatron-core's LLaVAModel, data of noise, and Bridge's own
forward step for LLaVA. Bridge cannot be imported without Transformer Engine.
"""

import copy
import sys
from dataclasses import dataclass

import torch

from rsa_megatron import megatron_on_cpu

megatron_on_cpu.enable()  # before megatron is imported; does nothing where there is a GPU
try:
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config
    from megatron.bridge.training.llava_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
except ImportError as error:
    sys.exit(
        f"error: Megatron-Bridge cannot be imported ({error}): pip install 'megatron-bridge[te]==0.6.2', with CUDA"
    )
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.optimizer import OptimizerConfig

from rsa_megatron import RSAConfig, RSAPlugin  # RSA
from rsa_megatron.models.layer_specs import layer_specs
from rsa_megatron.training import megatron_patches

IMAGE_TOKEN, VOCABULARY, SEQ_LENGTH, IMAGE_SIZE, PATCH_SIZE = 511, 512, 16, 32, 8
rsa = RSAPlugin(RSAConfig(weight=0.01))  # RSA
forward_step = rsa.wrap_forward_step(forward_step)  # RSA


@dataclass
class LlavaProvider(GPTModelProvider):
    """A LLaVAModel of two layers in the tower and two in the decoder."""

    def provide(self, pre_process=None, post_process=None, vp_stage=None) -> LLaVAModel:
        tower = copy.deepcopy(self)
        tower.pipeline_model_parallel_size, tower.vision_model_type = 1, "clip"
        vision_layer, language_layer, projector = layer_specs("local")
        # An image takes one position of the text, and (32 / 8)^2 of the row.
        max_length = SEQ_LENGTH - 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2
        return LLaVAModel(
            self,
            language_layer,
            VOCABULARY,
            max_length,
            tower,
            vision_layer,
            True,
            copy.deepcopy(tower),
            projector,
            pre_process=pre_process,
            post_process=post_process,
            add_encoder=pre_process,
            vp_stage=vp_stage,
            img_h=IMAGE_SIZE,
            img_w=IMAGE_SIZE,
            patch_dim=PATCH_SIZE,
            image_token_index=IMAGE_TOKEN,
            pg_collection=self._pg_collection,
        )


@dataclass
class Noise(DatasetProvider):
    """A data set for training, and none for evaluation."""

    def build_datasets(self, context):
        return [Samples(context.train_samples), None, None]


class Samples(torch.utils.data.Dataset):
    """An image and its caption: sample i is the same every time, and tells nothing."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, IMAGE_TOKEN, (SEQ_LENGTH + 1,), generator=noise)
        tokens[0] = IMAGE_TOKEN
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH),
            "pixel_values": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=noise),
        }


def main():
    megatron_patches.repair()  # of megatron-core as PyPI has it
    provider = LlavaProvider(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        seq_length=SEQ_LENGTH,
        vocab_size=VOCABULARY,
        # What needs Transformer Engine or apex is off, as a job for the CPU has it.
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
    )
    provider.register_pre_wrap_hook(rsa.attach)  # RSA
    pretrain(
        config.ConfigContainer(
            model=provider,
            train=config.TrainingConfig(micro_batch_size=4, global_batch_size=16, train_iters=5),
            validation=config.ValidationConfig(eval_iters=0),
            optimizer=OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=0.0),
            scheduler=config.SchedulerConfig(lr_decay_style="constant", start_weight_decay=0.01, end_weight_decay=0.01),
            dataset=Noise(dataloader_type="single", num_workers=0),
            logger=config.LoggerConfig(log_interval=1),
            tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
            checkpoint=config.CheckpointConfig(),
        ),
        forward_step,
    )


if __name__ == "__main__":
    main()
