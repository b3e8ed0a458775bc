"""Where transformers' vision-language models have what RSA compares, and how their images lie in a batch: a line a family.

v of an image is the mean of the tower's last states before any merger or projector. They are what goes into the module that
connects tower and decoder, and are read there. In all these models placeholders are expanded beforehand: a position of the text
is a row of the decoder, and an image is a run of image tokens.

Shapes: T tiles of P tokens; n images of the batch; D the tower's width; B samples, S positions.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsa_megatron.alignment.pooling import image_vectors, pool_packed_text


class Images(NamedTuple):
    """The images of a batch, in the order in which the model reads them."""

    #: a sample's images, [B]
    count_B: Tensor
    #: an image's placeholders, [n]
    length_n: Tensor
    #: whether an image lies where the decoder attends, [B, S]
    is_image_BS: Tensor


class Family(NamedTuple):
    """How to read v in one kind of model.

    Args:
        connector: the module's name within the model that has `language_model`.
        mean: gives v of each image, [n, D], of (the connector's states, that model, the batch, the images, image_pooling).
        reads_output: the states are what the module gives, not what goes into it.
    """

    connector: str
    mean: Callable[[Tensor, nn.Module, dict, Images, str], Tensor]
    reads_output: bool = False


def mean_of_grid(states: Tensor, model: nn.Module, batch: dict, images: Images, pooling: str) -> Tensor:
    """Of [sum of t h w, D], images one after another. Qwen2.5-VL orders the tokens by windows, within each image: means are the same."""
    states = states.reshape(-1, states.shape[-1])
    length_n = batch["image_grid_thw"].to(states.device).prod(dim=-1)
    _check_sum("image_grid_thw has patches", length_n, states)
    image_T = torch.repeat_interleave(torch.arange(1, len(length_n) + 1, device=states.device), length_n)
    return pool_packed_text(states, image_T, len(length_n)) / length_n[:, None]


def mean_of_anyres(states_TPD: Tensor, model: nn.Module, batch: dict, images: Images, pooling: str) -> Tensor:
    """Of LLaVA-NeXT's tiles, the base image first; the model has taken a batch's padding tiles off."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    config, sizes = model.config, [list(map(int, size)) for size in batch["image_sizes"]]
    per_sample = batch.get("batch_num_images")
    # LLaVA-OneVision leaves the images of a sample that has several whole, if the batch says so.
    is_cut = [True] * len(sizes) if per_sample is None else [n == 1 for n in map(int, per_sample) for _ in range(n)]
    edge = config.vision_config.image_size
    count = [image_size_to_num_patches(s, config.image_grid_pinpoints, edge) if c else 1 for s, c in zip(sizes, is_cut)]
    count_n = torch.tensor(count, device=states_TPD.device)
    _check_sum("image_sizes make tiles", count_n, states_TPD)
    return image_vectors(states_TPD, count_n, pooling=pooling, base_tile="first")


def mean_of_shuffled(states: Tensor, model: nn.Module, batch: dict, images: Images, pooling: str) -> Tensor:
    """Of InternVL's tiles, the thumbnail last: [T, P / 4, 4 D], each token four of the tower's side by side."""
    tokens_TPD = states.reshape(len(states), -1, model.config.vision_config.hidden_size)
    count_n = (images.length_n // states.shape[1]).to(states.device)
    _check_sum("the image tokens of input_ids make tiles", count_n, states)
    return image_vectors(tokens_TPD, count_n, pooling=pooling, base_tile="last")


def mean_of_whole(states_nPD: Tensor, model: nn.Module, batch: dict, images: Images, pooling: str) -> Tensor:
    """Of images that are one tile each."""
    count_n = torch.ones(len(states_nPD), dtype=torch.int64, device=states_nPD.device)
    return image_vectors(states_nPD, count_n)


#: by the model's config.model_type
FAMILIES = {
    "llava_onevision": Family("multi_modal_projector", mean_of_anyres),
    "llava_next": Family("multi_modal_projector", mean_of_anyres),
    "llava": Family("multi_modal_projector", mean_of_whole),
    "internvl": Family("multi_modal_projector", mean_of_shuffled),
    "gemma3": Family("multi_modal_projector", mean_of_whole),
    "qwen2_vl": Family("visual.merger", mean_of_grid),
    "qwen2_5_vl": Family("visual.merger", mean_of_grid),
    "qwen3_vl": Family("visual.merger", mean_of_grid),
    "qwen3_vl_moe": Family("visual.merger", mean_of_grid),
    "glm4v": Family("visual.post_layernorm", mean_of_grid, reads_output=True),
    "glm4v_moe": Family("visual.post_layernorm", mean_of_grid, reads_output=True),
}


def find_model(model: nn.Module, family: Family | None = None) -> tuple[nn.Module, Family]:
    """Return the module that holds tower and decoder, inside whatever wraps it (DDP, FSDP, DeepSpeed, PEFT), and its family.

    Raises:
        ValueError: when there is none of a known family.
    """
    met = {}
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        met[kind] = None
        found = family or FAMILIES.get(kind)
        if found and hasattr(module, "language_model") and _has(module, found.connector):
            return module, found
    if family:
        raise ValueError(f"RSA: no module of this model has `language_model` and `{family.connector}`")
    raise ValueError(
        f"RSA does not know the model type {', '.join(map(str, met)) or None}: those it knows are {', '.join(FAMILIES)}; for another one pass "
        "rsa_family=Family(connector, mean), the name of the module that reads the tower's last states and how an image's lie there"
    )


def find_images(batch: dict, config) -> Images:
    """Return the images of a batch: each run of image tokens is one."""
    is_image_BS = (batch["input_ids"] == _token(config, "image")) & ~_in_video(batch)
    starts_BS = is_image_BS.clone()
    starts_BS[:, 1:] &= ~is_image_BS[:, :-1]
    image_BS = starts_BS.flatten().cumsum(0).view_as(is_image_BS) - 1
    length_n = torch.bincount(image_BS[is_image_BS], minlength=int(starts_BS.sum()))
    attended = batch.get("attention_mask")
    if attended is not None and attended.shape == is_image_BS.shape:
        # Some collators hide an image behind the text of a batch that has none, for FSDP's and ZeRO's sake.
        is_image_BS = is_image_BS & (attended > 0)
    return Images(starts_BS.sum(dim=1), length_n, is_image_BS)


def find_videos(batch: dict, config) -> Tensor:
    """Whether a sample has a video, [B]."""
    token, input_ids = _token(config, "video"), batch["input_ids"]
    return (_in_video(batch) | (input_ids == (-1 if token is None else token))).any(dim=1)


def _in_video(batch: dict) -> Tensor:
    """Where a batch says so, [B, S]: GLM's videos have image tokens."""
    kinds_BS = batch.get("mm_token_type_ids")
    return torch.zeros_like(batch["input_ids"], dtype=torch.bool) if kinds_BS is None else kinds_BS == 2


def count_images(images: Images, num_images: int, batch: dict) -> Tensor:
    """A sample's images, [B], where the tower has read `num_images`.

    Raises:
        ValueError: when images cannot be told apart.
    """
    if len(images.length_n) == num_images:
        return images.count_B
    stated = batch.get("batch_num_images")
    if stated is not None and len(stated) == len(images.count_B) and int(sum(stated)) == num_images:
        return torch.as_tensor(stated, device=images.count_B.device)
    raise ValueError(
        f"RSA: the batch has {num_images} images and {len(images.length_n)} runs of image tokens in input_ids: put a token between two "
        "images, as the processors' chat templates do, or give batch_num_images"
    )


def _token(config, kind: str) -> int | None:
    return getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", None))


def _has(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def _check_sum(what: str, count_n: Tensor, states: Tensor) -> None:
    if int(count_n.sum()) != len(states):
        raise ValueError(f"RSA: the batch's {what}: {int(count_n.sum())}; the tower has given {len(states)}")
