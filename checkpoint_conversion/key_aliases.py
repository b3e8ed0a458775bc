"""The styles in which checkpoints of Hugging Face name their tensors, brought to the hub's.

As transformers and others have saved them: llava-hf's on the hub; transformers 4.52 to 5.5; the module tree of 5.23;
5.23 saving a model it has built; the original lmms-lab checkpoints; and the two that training starts from, SigLIP and
Qwen2.
"""

from checkpoint_conversion.weight_map import IMAGE_NEWLINE, LM_HEAD, PROJECTOR, TOWER

_DECODER = "language_model.model."

# The order is important: the first prefix that fits counts, and some are the beginning of others.
_PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": TOWER,  # lmms-lab
    "model.vision_tower.vision_model.": TOWER,
    "model.vision_tower.": TOWER,
    "vision_tower.vision_model.": TOWER,
    "vision_tower.": TOWER,
    "vision_model.": TOWER,  # SigLIP
    "embeddings.": TOWER + "embeddings.",  # only SigLIP's tower, saved by 5.23
    "encoder.": TOWER + "encoder.",
    "post_layernorm.": TOWER + "post_layernorm.",
    "head.": TOWER + "head.",
    "model.multi_modal_projector.": PROJECTOR,
    "multi_modal_projector.": PROJECTOR,
    "model.mm_projector.0.": PROJECTOR + "linear_1.",  # lmms-lab; .1 is the GELU between
    "model.mm_projector.2.": PROJECTOR + "linear_2.",
    "model.image_newline": IMAGE_NEWLINE,
    "image_newline": IMAGE_NEWLINE,
    "language_model.lm_head.weight": LM_HEAD,
    "lm_head.weight": LM_HEAD,
    "language_model.model.": _DECODER,
    "model.language_model.": _DECODER,
    "model.": _DECODER,  # lmms-lab, Qwen2
}

# Not in the model: SigLIP's text tower and attention pooling, and buffers that old versions have saved.
_STRAY_PREFIXES = ("text_model.", "logit_scale", "logit_bias", TOWER + "head.")
_STRAY_SUFFIXES = (".position_ids", ".rotary_emb.inv_freq")


def to_hub_name(name: str) -> str | None:
    """Return the hub's name of a tensor; None for one that is not in the model, an unknown name unchanged."""
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
            break
    return None if name.startswith(_STRAY_PREFIXES) or name.endswith(_STRAY_SUFFIXES) else name
