"""One optimizer step of transformers' Trainer with RSA, and the same step written out on one process."""

import tempfile
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from rsa_megatron import RSAConfig
from rsa_megatron.alignment.distances import pairwise_distance
from rsa_megatron.alignment.loss import rsa_loss_reference
from rsa_megatron.huggingface import RSATrainerMixin
from tests.support import trainer_models
from tests.support.trainer_models import Sample


class RSATrainer(RSATrainerMixin, transformers.Trainer):
    pass


class Step(NamedTuple):
    #: of each parameter, as the optimizer gets it
    gradients: dict[str, Tensor]
    #: the samples of each micro-batch of this rank
    micro_batches: list[list[Sample]]
    #: what has been logged
    log: dict


class _Recorder(transformers.TrainerCallback):
    def __init__(self, model):
        self.model, self.gradients = model, {}

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()
        }


def make_trainer(trainer_class, kind, model, chosen: list, *, micro_batches: list | None = None, **options):
    """A Trainer that reads the samples in order, and adds each micro-batch's to `micro_batches`."""
    own = {name: options.pop(name) for name in list(options) if name.startswith("rsa") or name == "callbacks"}
    settings = dict(
        output_dir=tempfile.gettempdir() + "/unused",
        use_cpu=True,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )

    def collate(samples):
        if micro_batches is not None:
            micro_batches.append(samples)
        return kind.batch(model, samples)

    arguments = transformers.TrainingArguments(**settings | options)
    return trainer_class(model=model, args=arguments, train_dataset=chosen, data_collator=collate, **own)


def take_step(name: str, chosen: list[Sample], config: RSAConfig, **options) -> Step:
    """The first step, of `per_device_train_batch_size` samples x `gradient_accumulation_steps` on each rank."""
    kind, micro_batches = trainer_models.tiny(name), []
    model = kind.build()
    recorder = _Recorder(model)
    trainer = make_trainer(
        RSATrainer, kind, model, chosen, micro_batches=micro_batches, rsa=config, callbacks=[recorder], **options
    )
    trainer.train()
    count = trainer.args.gradient_accumulation_steps
    return Step(recorder.gradients, micro_batches[:count], trainer.state.log_history[0])


def take_sharded_step(name: str, batch_size: int, config: RSAConfig) -> Step:
    """The same of one micro-batch, with FSDP2's shards in the place of DDP's copies. (accelerate prepares FSDP on GPUs only.)"""
    kind, rank = trainer_models.tiny(name), torch.distributed.get_rank()
    model, chosen = kind.build().train(), trainer_models.samples(batch_size, first=batch_size * rank)
    trainer, batch = make_trainer(RSATrainer, kind, model, chosen, rsa=config), kind.batch(model, chosen)
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*model.model.language_model.layers, *model.model.visual.blocks, model.model.visual.merger, model):
        fully_shard(module, mesh=mesh)
    trainer.compute_loss(model, batch).backward()
    gradients = {
        n: torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()
    }
    return Step(gradients, [chosen], {})


def write_out_step(name: str, ranks: list[list[list[Sample]]], config: RSAConfig) -> Step:
    """The step of all ranks' micro-batches [rank][m]: the model's own loss, and eq. 5 of each micro-batch of all ranks."""
    kind = trainer_models.tiny(name)
    model = kind.build().train()
    num_micro_batches, batches = len(ranks[0]), [kind.batch(model, samples) for rank in ranks for samples in rank]
    if getattr(model, "accepts_loss_kwargs", True):
        num_tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        lm_loss = sum(model(**batch, num_items_in_batch=num_tokens).loss for batch in batches)
    else:
        lm_loss = sum(model(**batch).loss for batch in batches) / len(batches)
    pairs = []
    for m in range(num_micro_batches):
        of_all = [sample for rank in ranks for sample in rank[m] if len(sample.pictures) == 1]
        v = [kind.v_of_one(model, sample.pictures[0], config.image_pooling) for sample in of_all]
        t = [kind.t_of_one(model, sample) for sample in of_all]
        pairs.append([torch.stack(x) if x else torch.zeros(0, 1) for x in (v, t)])
    if config.scope == "global-batch":
        rsa_loss = _loss_of_global_batch(pairs)
    else:
        settings = dict(distance=config.distance, normalize=config.normalize)
        rsa_loss = sum(rsa_loss_reference(*pair, **settings) for pair in pairs) / num_micro_batches
    (lm_loss + config.weight * rsa_loss).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    num_pairs = sum(len(v) for v, _ in pairs) / (1 if config.scope == "global-batch" else num_micro_batches)
    loss = lm_loss + config.weight * rsa_loss
    log = dict(loss=loss.item(), lm_loss=lm_loss.item(), rsa_loss=rsa_loss.item(), rsa_pairs=num_pairs)
    return Step(gradients, [], log)


def _loss_of_global_batch(pairs: list[list[Tensor]]) -> Tensor:
    """Its value is eq. 5 of all pairs; its gradient takes each block between two micro-batches at the later one, twice."""
    every = [torch.cat(x) for x in zip(*pairs)]
    num_pairs, done, total = len(every[0]), 0, 0.0
    for v, t in pairs:
        both = [torch.cat([x[:done].detach(), own]) for x, own in zip(every, (v, t))]
        square = (
            pairwise_distance(both[0], distance="euclidean") - pairwise_distance(both[1], distance="euclidean")
        ) ** 2
        between = square[:done, done:].sum()
        total = total + square[done:, done:].sum() + 4 * between - 2 * between.detach()
        done += len(v)
    return total / num_pairs**2


def differ_by(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over that of the expected."""
    assert actual.keys() == expected.keys()
    square = sum((actual[name] - expected[name]).double().square().sum() for name in expected)
    return (square / sum(x.double().square().sum() for x in expected.values())).sqrt().item()
