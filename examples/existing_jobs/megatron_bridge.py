"""A Megatron-Bridge job, and the lines that add RSA to it: those that end in "# RSA", and no others.

    torchrun --nproc-per-node 2 examples/existing_jobs/megatron_bridge.py

The job is a small one of its own: a provider that builds megatron-core's LLaVAModel, data of noise, and Bridge's own
forward step for LLaVA. Without a GPU it runs on the CPU, if Bridge can be imported there.
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
    sys.exit(f"error: Megatron-Bridge cannot be imported ({error}): pip install megatron-bridge==0.6.2, which needs CUDA")
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.optimizer import OptimizerConfig

from rsa_megatron import RSAConfig, RSAPlugin  # RSA
from rsa_megatron.llava.layer_specs import layer_specs

IMAGE_TOKEN, VOCABULARY, SEQ_LENGTH = 511, 512, 16
rsa = RSAPlugin(RSAConfig(weight=0.01))  # RSA
forward_step = rsa.wrap_forward_step(forward_step)  # RSA


@dataclass
class LlavaProvider(GPTModelProvider):
    """LLaVAModel of two small layers and two small layers."""

    def provide(self, pre_process=None, post_process=None, vp_stage=None) -> LLaVAModel:
        tower = copy.deepcopy(self)
        tower.pipeline_model_parallel_size, tower.vision_model_type = 1, "clip"
        vision_layer, language_layer, projector = layer_specs("local")
        return LLaVAModel(
            self, language_layer, VOCABULARY, SEQ_LENGTH + 16, tower, vision_layer, True, tower, projector,
            pre_process=pre_process, post_process=post_process, add_encoder=pre_process, vp_stage=vp_stage,
            img_h=32, img_w=32, patch_dim=8, image_token_index=IMAGE_TOKEN, pg_collection=self._pg_collection,
        )  # fmt: skip


@dataclass
class Noise(DatasetProvider):
    """Samples of one image and one caption; image i and caption i are always the same."""

    def build_datasets(self, context):
        return [Samples(context.train_samples), None, None]


class Samples(torch.utils.data.Dataset):
    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, IMAGE_TOKEN, (SEQ_LENGTH + 1,), generator=noise)
        tokens[0] = IMAGE_TOKEN
        loss_mask = torch.ones(SEQ_LENGTH)
        return dict(tokens=tokens[:-1], labels=tokens[1:], loss_mask=loss_mask, position_ids=torch.arange(SEQ_LENGTH),
                    pixel_values=torch.randn(3, 32, 32, generator=noise))  # fmt: skip


def main():
    provider = LlavaProvider(
        num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=SEQ_LENGTH, vocab_size=VOCABULARY,
        # What needs Transformer Engine or apex is off, as a job for the CPU has it.
        use_cpu_initialization=True, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False, persist_layer_norm=False, attention_softmax_in_fp32=True,
    )  # fmt: skip
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
