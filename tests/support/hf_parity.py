"""A Hugging Face model and the Megatron model that its checkpoint was converted to, on the same samples, in any layout.

transformers runs in the test's own process, Megatron in warm processes: what makes Megatron run on a CPU replaces parts
of torch that transformers uses.
"""

from pathlib import Path

import torch

from checkpoint_conversion import __main__ as conversion
from checkpoint_conversion import forward_comparison
from tests.support import layouts, processes, tiny_hf
from tests.support.packed_batches import as_packed_row, use_packed_rows

MEGATRON_FLAGS = [
    "--train-iters",
    "1",
    "--seq-length",
    "256",
    "--eval-iters",
    "0",
    "--rsa-weight",
    "0",
    "--mutual-knn-samples",
    "0",
]


class Models:
    """A random model in both forms, the samples, and what transformers makes of them."""

    def __init__(self, folder: Path, demo: Path, *, tied: bool):
        self.demo = demo
        self.hf = tiny_hf.write(folder / "hf", demo / "tokenizer", tied=tied)
        self.megatron = self.convert(folder / "megatron")
        encoder, pictures = (
            forward_comparison.make_encoder(self.hf),
            [forward_comparison.make_picture(*size, seed) for seed, size in enumerate(tiny_hf.IMAGE_SIZES)],
        )
        images = {f"{picture.width} x {picture.height}": [picture] for picture in pictures}
        images |= {"two images": pictures[1:3], "three images": pictures[6:9], "no image": []}
        # Captions of different lengths, so that rows of a batch are padded.
        captions = [" ".join(["A red boat lies in the harbour."] * (1 + i % 3)) for i in range(len(images))]
        self.samples = [
            forward_comparison.make_sample(name, pictures, encoder, self.hf, caption)
            for (name, pictures), caption in zip(images.items(), captions)
        ]
        encoded = [encoder.encode_sample(sample.stored) for sample in self.samples]
        self.batch = encoder.batch(encoded)
        self.alone = [encoder.batch([one]) for one in encoded]
        self.expected = forward_comparison.run_hugging_face(self.hf, self.samples, torch.float32)

    def flags(self, *flags: str) -> list[str]:
        """The main job's arguments for this model."""
        data = str(self.demo / "data" / "captions")
        size = str(len(self.samples))
        return [
            "--model",
            str(self.hf),
            "--tokenizer-model",
            str(self.hf),
            "--data-path",
            data,
            "--micro-batch-size",
            size,
            "--global-batch-size",
            size,
            *MEGATRON_FLAGS,
            *flags,
        ]

    def convert(self, out: Path) -> Path:
        """Another Megatron checkpoint of the same model."""
        conversion.main(["hf-to-megatron", "--hf", str(self.hf), "--out", str(out)])
        return out

    def packed_difference(self, world_size: int = 1, *flags: str, setup=use_packed_rows) -> float:
        """The largest difference of logits over all samples, in packed rows and, in the same model, in rows of their own."""
        rows = [as_packed_row(self.alone[first : first + 3]) for first in range(0, len(self.alone), 3)]
        argv = self.flags("--load", str(self.megatron), *flags, "--seq-length", "512")
        ranks = processes.run(_packed_logits, world_size, argv, rows, self.batch, setup)
        packed, alone = next(result for result in ranks if result is not None)
        found = 0.0
        for expected, of_packed, of_own_row in zip(self.expected, packed, alone, strict=True):
            wanted = expected["logits"]  # of the last token too, which is an input in a packed row alone
            length, width = wanted.shape
            assert len(of_packed) == length
            pairs = (of_packed[:, :width] - wanted, of_own_row[: length - 1, :width] - wanted[:-1])
            found = max(found, *(difference.abs().max().item() for difference in pairs))
        return found

    def differences(
        self, world_size: int = 1, *flags: str, sabotage=None, checkpoint: Path | None = None
    ) -> dict[str, float]:
        """Largest differences of logits and losses over all samples, in one padded batch; absolute."""
        argv = self.flags("--load", str(checkpoint or self.megatron), *flags)
        ranks = processes.run(_logits_and_losses, world_size, argv, self.batch, sabotage)
        logits, losses = next(result for result in ranks if result is not None)
        found = {"logits": 0.0, "loss": 0.0}
        for row, expected in enumerate(self.expected):
            # The batch has all inputs but the last token, which is a label alone.
            wanted = expected["logits"][:-1]
            actual = logits[row, : len(wanted), : wanted.shape[1]]  # without the vocabulary's padding
            found["logits"] = max(found["logits"], (actual - wanted).abs().max().item())
            found["loss"] = max(found["loss"], abs(losses[row] - expected["loss"].item()))
        return found


def _logits_and_losses(argv, batch, sabotage):
    """On the last stage's first rank: logits [B, L, vocabulary] and the loss of each sample."""
    if sabotage:
        sabotage()
    trainer = layouts.Trainer(argv)
    logits, _ = forward(trainer, batch)
    token_loss, mask = forward(trainer, batch, labels=batch.labels, loss_mask=batch.loss_mask)
    if logits is None:
        return None
    return logits, ((token_loss * mask).sum(1) / mask.sum(1)).tolist()


def _packed_logits(argv, rows, batch, setup):
    """On the last stage's first rank: logits of each sample in packed rows, and in rows of their own."""
    setup()
    trainer = layouts.Trainer(argv)
    *logits, alone = (forward(trainer, one)[0] for one in (*rows, batch))
    if alone is None:
        return None
    lengths = [row.sequence_lengths.tolist() for row in rows]
    return [one for of_row, n in zip(logits, lengths) for one in of_row[0, : sum(n)].split(n)], alone


@torch.no_grad()
def forward(trainer: layouts.Trainer, batch, **labels):
    """The model's output and loss mask for a batch through Megatron's schedule, whole; (None, None) but on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import get_attr_wrapped_model

    from rsa_megatron.training import train_step

    masks = []

    def step(data_iterator, model):
        llava = get_attr_wrapped_model(model, "image_token_index", return_model_obj=True)
        output, mask = model(
            batch.images if llava.pre_process else None,
            batch.tokens,
            None,
            None,
            image_layouts=batch.image_layouts,
            sound_clips=torch.zeros(0),
            packed_seq_params=train_step._describe_packed_row(batch, llava),
            **labels,
        )
        masks.append(mask)
        return output, lambda output, non_loss_data: output

    for chunk in trainer.model:
        chunk.eval()
    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=trainer.model,
        num_microbatches=1,
        seq_length=trainer.args.seq_length,
        micro_batch_size=len(batch.tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not outputs:
        return None, None
    (output,) = outputs
    if not labels:
        output = gather_from_tensor_model_parallel_region(output)
    return output, masks[-1]


# Absolute, of logits whose standard deviation is 1: some hundred roundings of 6e-8 lie between pixels and logits.
TOLERANCE = 1e-5


PADDED = "one process, 109 rows of padding"


LAYOUTS = {
    "one process": (1, ()),
    "TP=2": (2, layouts.TP),
    "PP=2": (2, layouts.PP),
    "TP=2 PP=2": (4, layouts.TP + layouts.PP),
    "TP=2 SP": (2, (*layouts.TP, "--sequence-parallel")),
    PADDED: (1, ("--make-vocab-size-divisible-by", "128")),
}


def flat(layout: str) -> tuple:
    world_size, flags = LAYOUTS[layout]
    return world_size, *flags


# Mistakes, made in the process that runs the model. The first six are those of the reference's table, by their cost.


def causal_tower():
    from megatron.core.transformer.enums import AttnMaskType

    attention = {"attn_mask_type": AttnMaskType.causal}
    _change_layer_specs(lambda vision_spec: vision_spec.submodules.self_attention.params.update(attention))


def last_norm_applied():
    from rsa_megatron.models import llava_onevision

    llava_onevision._UnusedNorm.forward = lambda self, x: torch.nn.functional.layer_norm(
        x, x.shape[-1:], self.weight, self.bias, 1e-6
    )


def rope_base_of_other_models():
    from rsa_megatron.models import llava_onevision

    right = llava_onevision.LlavaOneVision.__init__
    llava_onevision.LlavaOneVision.__init__ = lambda self, *args, **sizes: right(
        self, *args, **sizes | {"rotary_base": 10000}
    )


def exact_gelu_in_the_tower():
    _change_vision_config(activation_func=torch.nn.functional.gelu)


def epsilon_of_other_towers():
    _change_vision_config(layernorm_epsilon=1e-5)


def base_tile_last():
    from rsa_megatron.models import anyres_projector

    right = anyres_projector.pack_images

    def wrong(tokens_TPH, layouts, *args):
        order, first = [], 0
        for layout in layouts:
            order += [*range(first + 1, first + layout.num_tiles), first]
            first += layout.num_tiles
        return right(tokens_TPH[order], layouts, *args)

    anyres_projector.pack_images = wrong


def tiles_column_by_column():
    from rsa_megatron.models import anyres_projector

    right = anyres_projector._pack_grid

    def wrong(grid_TPH, layout, *args):
        rows, columns = layout.grid_rows, layout.grid_columns
        return right(grid_TPH[[c * rows + r for r in range(rows) for c in range(columns)]], layout, *args)

    anyres_projector._pack_grid = wrong


def shrunk_by_nearest_neighbours():
    from rsa_megatron.models import anyres_projector

    right = torch.nn.functional.interpolate
    anyres_projector.torch.nn.functional.interpolate = lambda x, size, mode: right(x, size, mode="nearest")


def no_newline():
    from rsa_megatron.models import anyres_projector

    right = anyres_projector.pack_images
    anyres_projector.pack_images = lambda tokens, layouts, newline, *args: right(tokens, layouts, 0 * newline, *args)


def padding_in_the_softmax():
    from rsa_megatron.models import llava_onevision

    llava_onevision._mask_padding = lambda vocab_size, padded, rank, layer, args, output: output


def _change_vision_config(**changes):
    from rsa_megatron.models import llava_onevision

    right = llava_onevision.make_vision_config

    def wrong(*args):
        config = right(*args)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    llava_onevision.make_vision_config = wrong


def _change_layer_specs(change):
    from rsa_megatron.models import llava_onevision

    right = llava_onevision.layer_specs

    def wrong(*args):
        specs = right(*args)
        change(specs[0])
        return specs

    llava_onevision.layer_specs = wrong


MISTAKES = {
    "tower causal (Megatron's own local spec, before 0.19)": causal_tower,
    "tower's last norm applied": last_norm_applied,
    "rope base 10000": rope_base_of_other_models,
    "exact GELU in the tower": exact_gelu_in_the_tower,
    "norm epsilon 1e-5 in the tower": epsilon_of_other_towers,
    "base tile last": base_tile_last,
    "tiles column by column": tiles_column_by_column,
    "shrunk by nearest neighbours": shrunk_by_nearest_neighbours,
    "image_newline zero": no_newline,
}


def token_after_an_image_not_learnt():
    from rsa_megatron.models import llava_onevision

    del llava_onevision.LlavaOneVision._preprocess_data


def parts_one_after_the_other(parts, groups):
    return torch.cat(parts)
