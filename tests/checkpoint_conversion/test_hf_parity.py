"""What transformers computes with a checkpoint, Megatron computes with the converted one, and mistakes would be seen."""

import hf_parity
import pytest
import torch

from checkpoint_conversion import torch_dist_save

# Absolute, of logits whose standard deviation is 1: some hundred roundings of 6e-8 lie between pixels and logits.
TOLERANCE = 1e-5

_TP = ("--tensor-model-parallel-size", "2")
_PP = ("--pipeline-model-parallel-size", "2")


PADDED = "one process, 109 rows of padding"
LAYOUTS = {
    "one process": (1, ()),
    "TP=2": (2, _TP),
    "PP=2": (2, _PP),
    "TP=2 PP=2": (4, _TP + _PP),
    "TP=2 SP": (2, (*_TP, "--sequence-parallel")),
    PADDED: (1, ("--make-vocab-size-divisible-by", "128")),
}


def flat(layout: str) -> tuple:
    world_size, flags = LAYOUTS[layout]
    return world_size, *flags


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_losses_are_hugging_faces(models, layout):
    differences = models.differences(*flat(layout))
    assert max(differences.values()) < TOLERANCE, differences


# Mistakes, made in the process that runs the model. The first six are those of the reference's table, by their cost.


def causal_tower():
    from megatron.core.transformer.enums import AttnMaskType

    attention = {"attn_mask_type": AttnMaskType.causal}
    _change_layer_specs(lambda vision_spec: vision_spec.submodules.self_attention.params.update(attention))


def last_norm_applied():
    from rsa_megatron.llava import model

    model._UnusedNorm.forward = lambda self, x: torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)


def rope_base_of_other_models():
    from rsa_megatron.llava import model

    right = model.LlavaOneVision.__init__
    model.LlavaOneVision.__init__ = lambda self, *args, **sizes: right(self, *args, **sizes | {"rotary_base": 10000})


def exact_gelu_in_the_tower():
    _change_vision_config(activation_func=torch.nn.functional.gelu)


def epsilon_of_other_towers():
    _change_vision_config(layernorm_epsilon=1e-5)


def base_tile_last():
    from rsa_megatron.llava import anyres_projector

    right = anyres_projector.pack_images

    def wrong(tokens_TPH, layouts, *args):
        order, first = [], 0
        for layout in layouts:
            order += [*range(first + 1, first + layout.num_tiles), first]
            first += layout.num_tiles
        return right(tokens_TPH[order], layouts, *args)

    anyres_projector.pack_images = wrong


def tiles_column_by_column():
    from rsa_megatron.llava import anyres_projector

    right = anyres_projector._pack_grid

    def wrong(grid_TPH, layout, *args):
        rows, columns = layout.grid_rows, layout.grid_columns
        return right(grid_TPH[[c * rows + r for r in range(rows) for c in range(columns)]], layout, *args)

    anyres_projector._pack_grid = wrong


def shrunk_by_nearest_neighbours():
    from rsa_megatron.llava import anyres_projector

    right = torch.nn.functional.interpolate
    anyres_projector.torch.nn.functional.interpolate = lambda x, size, mode: right(x, size, mode="nearest")


def no_newline():
    from rsa_megatron.llava import anyres_projector

    right = anyres_projector.pack_images
    anyres_projector.pack_images = lambda tokens, layouts, newline, *args: right(tokens, layouts, 0 * newline, *args)


def padding_in_the_softmax():
    from rsa_megatron.llava import model

    model._mask_padding = lambda vocab_size, padded, rank, layer, args, output: output


def _change_vision_config(**changes):
    from rsa_megatron.llava import model

    right = model._vision_config

    def wrong(*args):
        config = right(*args)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    model._vision_config = wrong


def _change_layer_specs(change):
    from rsa_megatron.llava import model

    right = model.layer_specs

    def wrong(*args):
        specs = right(*args)
        change(specs[0])
        return specs

    model.layer_specs = wrong


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


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(models, mistake):
    assert models.differences(sabotage=MISTAKES[mistake])["logits"] > 10 * TOLERANCE


def test_padding_in_the_softmax_would_be_seen(models):
    differences = models.differences(*flat(PADDED), sabotage=padding_in_the_softmax)
    assert differences["logits"] < TOLERANCE < 10 * TOLERANCE < differences["loss"]


def token_after_an_image_not_learnt():
    from rsa_megatron.llava import model

    del model.LlavaOneVision._preprocess_data


def test_the_token_after_an_image_left_out_of_the_loss_would_be_seen(models):
    differences = models.differences(sabotage=token_after_an_image_not_learnt)
    assert differences["logits"] < TOLERANCE < 10 * TOLERANCE < differences["loss"]


def parts_one_after_the_other(parts, groups):
    return torch.cat(parts)


def test_queries_keys_and_values_not_interleaved_would_be_seen(models, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_dist_save, "join", parts_one_after_the_other)
    assert models.differences(checkpoint=models.convert(tmp_path / "wrong"))["logits"] > 10 * TOLERANCE

