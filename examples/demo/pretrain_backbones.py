"""Make the demo's "pretrained" parts: a language model that knows the captions, a tower that knows the scenes.

    torchrun --nproc-per-node 2 examples/demo/pretrain_backbones.py \
        --data-path demo/data/captions --tokenizer-model demo/tokenizer --load demo/parts --save demo/parts

Real users begin from checkpoints; the demo makes its own, in about a minute. One run of Megatron's pretrain() learns
both, each for itself: the decoder predicts captions without seeing an image, the tower tells what is in a scene
(themes, things, colours, places) through a linear head. Neither sees the other, as with parts pretrained apart.
"""

from functools import partial

from rsa_megatron.training import megatron_patches  # isort: skip  # rsa_megatron.training is imported before Megatron
import torch
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from rsa_megatron.data.synthetic import scenes
from rsa_megatron.plugin import RSAPlugin
from rsa_megatron.ranks import end_with_launcher
from rsa_megatron.recipes import demo_parts
from rsa_megatron.training import providers
from rsa_megatron.training.arguments import parse
from rsa_megatron.training.checkpoint_saving import surround_checkpoints
from rsa_megatron.training.learning_rates import LearningRates
from rsa_megatron.training.metrics_file import write_metrics
from rsa_megatron.training.run_folder import RunFolder

LABELS = scenes.all_labels()


def main():
    rsa = RSAPlugin()
    args = parse(rsa, settings=demo_parts())
    end_with_launcher()
    megatron_patches.repair()
    surround_checkpoints()
    LearningRates(args).apply()
    write_metrics(args)
    with RunFolder(args) as folder:
        pretrain(
            pretrain_cfg_container_from_args(args),
            providers.datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            folder.wrap_model_provider(model_provider),
        )


def model_provider(*args, **kwargs):
    """The LLaVA model with a head on its tower, which later stages do not load."""
    model = providers.model_provider(*args, **kwargs)
    model.scene_head = torch.nn.Linear(model.vision_model.config.hidden_size, len(LABELS))
    return model


def forward_step(data_iterator, model):
    llava = get_attr_wrapped_model(model, "scene_head", return_model_obj=True)
    batch = next(data_iterator)
    device = torch.cuda.current_device()
    images, tokens, labels, loss_mask = (
        # The plain template begins with the image: without that token, the caption is alone.
        x.to(device)
        for x in (batch.images, batch.tokens[:, 1:], batch.labels[:, 1:], batch.loss_mask[:, 1:])
    )
    token_loss, loss_mask = model(
        images[:0],
        tokens,
        torch.arange(tokens.shape[1], device=device).expand_as(tokens),
        None,
        labels=labels,
        loss_mask=loss_mask,
        sound_clips=images.new_zeros(0),
    )
    logits = llava.scene_head(llava.vision_model(images.to(llava.scene_head.weight.dtype)).mean(dim=1))
    contents = torch.tensor([[label in record["contents"] for label in LABELS] for record in batch.records])
    return token_loss, partial(loss_func, loss_mask, logits.float(), contents.to(logits.device).float())


def loss_func(loss_mask, logits, contents, token_loss):
    num_tokens = loss_mask.sum().int()
    lm_loss = (token_loss.float() * loss_mask).sum()
    # A sum over labels, a mean over scenes: a few labels of a thousand are true, a mean over all would be tiny.
    scene_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, contents, reduction="none").sum(1).mean()
    one = torch.ones((), device=lm_loss.device)
    report = {
        "lm loss": torch.stack([lm_loss.detach(), num_tokens.float()]),
        "scene loss": torch.stack([scene_loss.detach(), one]),
    }
    return lm_loss + num_tokens * scene_loss, num_tokens, report


if __name__ == "__main__":
    main()
