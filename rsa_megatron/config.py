"""The settings of the RSA loss. Everything else a run needs is a Megatron flag."""

import functools
import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple


class LayerPair(NamedTuple):
    """Two layers whose geometries RSA aligns: 0 is what goes into the first layer, -1 is the last."""

    vision: int
    text: int
    #: what its loss counts for beside those of other pairs
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.vision}:{self.text}"


@dataclass(frozen=True)
class RSAConfig:
    """How the RSA loss is taken. The defaults are the paper's; each field is the flag --rsa-<field>."""

    weight: float = field(default=0.01, metadata={"help": "lambda of eq. 6; 0 turns RSA off, at no cost"})
    """lambda_RSA of eq. 6. 0 turns the loss off: no pooling, no payload, no communication."""

    distance: str = field(
        default="euclidean",
        metadata={
            "choices": ("euclidean", "sqeuclidean", "cosine", "manhattan"),
            "help": "d of eq. 3 and 4; the scales differ, so the weight must go with it (paper, table G.1)",
        },
    )
    """d(., .) of eq. 3 and 4."""

    image_pooling: str = field(
        default="base",
        metadata={"choices": ("base", "full"), "help": "image tokens in the mean: the base image's, or all tiles'"},
    )
    """Tokens in v_i: of the base image (the whole picture at low resolution), or of all its tiles (table 2)."""

    base_tile: str = field(
        default="first",
        metadata={
            "choices": ("first", "last"),
            "help": "where the base image is among the tiles: first in "
            "Hugging Face and LLaVA-NeXT, last (the thumbnail) in Megatron's own tiler",
        },
    )
    """Which of an image's tiles is the base image."""

    stop_gradient: str = field(
        default="none",
        metadata={"choices": ("none", "text", "vision"), "help": "the side that gets no gradient from RSA"},
    )
    """The side whose vectors are constants: with "text", RSA does not move the language model (table 2)."""

    text_source: str = field(
        default="sequence",
        metadata={
            "choices": ("sequence", "caption"),
            "help": "sequence: t is the mean of the caption's states after its image; "
            "caption: of the caption read on its own, copied to the end of its sequence (eq. 2 taken literally)",
        },
    )
    """Whether t_i comes from the multimodal row, or from the caption on its own. The paper does not specify which it used."""

    layers: str = field(
        default="-1:-1",
        metadata={
            "help": "vision:text pairs of layers, as -1:-1,-2:14@0.5; 0 is what goes into the first layer, -1 what each backbone gives, "
            "the number after @ the pair's weight (1 without)"
        },
    )
    """Pairs of layers whose losses add up. The paper aligns the last layers and names others as open (appendix J)."""

    scope: str = field(
        default="micro-batch",
        metadata={
            "choices": ("micro-batch", "global-batch"),
            "help": "the pairs of a kernel: of one micro-batch on all "
            "data-parallel ranks, or of the optimizer step's global batch",
        },
    )
    """N of eq. 3 to 5: micro-batch x data-parallel ranks, or the global batch (alignment/global_batch_loss.py)."""

    normalize: str = field(
        default="none",
        metadata={
            "choices": ("none", "mean-distance"),
            "help": "mean-distance divides each kernel by its own mean, "
            "which makes the weight independent of the two spaces' scales",
        },
    )
    """Whether each kernel is divided by its own mean distance. Not in the paper."""

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"--rsa-weight must be 0 or more, not {self.weight}")
        for setting in fields(self):
            choices = setting.metadata.get("choices")
            if choices and getattr(self, setting.name) not in choices:
                flag = "--rsa-" + setting.name.replace("_", "-")
                raise ValueError(f"{flag} must be one of {', '.join(choices)}, not {getattr(self, setting.name)!r}")
        pairs = [(pair.vision, pair.text) for pair in self.layer_pairs]
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"--rsa-layers {self.layers} names a pair twice; give it a weight instead, as -1:-1@2")

    @functools.cached_property
    def layer_pairs(self) -> tuple[LayerPair, ...]:
        """`layers`, taken apart."""
        return tuple(_layer_pair(text, self.layers) for text in self.layers.split(","))


def _layer_pair(text: str, whole: str) -> LayerPair:
    layers, _, weight = text.partition("@")
    try:
        vision, _, decoder = layers.partition(":")
        pair = LayerPair(int(vision), int(decoder), float(weight or 1))
    except ValueError:
        pair = None
    if pair is None or not (math.isfinite(pair.weight) and pair.weight > 0):
        raise ValueError(
            f"--rsa-layers {whole} is no list of VISION:TEXT or VISION:TEXT@WEIGHT, such as -1:-1,-2:14@0.5"
        )
    return pair
