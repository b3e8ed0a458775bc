"""Loads a checkpoint's weights but for the projector, which stays as initialised.

For precomputed embeddings of another width than the tower's (ReVision): no checkpoint of a LLaVA has a projector for
them. LLaVAModel can ignore a missing projector, but Megatron's distributed checkpoints would still be asked for it.
"""

from megatron.core.models.multimodal.llava_model import LLaVAModel

_PROJECTOR = "vision_projection."


def leave_out_projector_once(model: LLaVAModel) -> None:
    """Load the next checkpoint without the projector; from then on it is saved and loaded as any other module."""
    whole = model.sharded_state_dict

    def without_projector(prefix: str = "", *args, **kwargs) -> dict:
        tensors = whole(prefix, *args, **kwargs)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix + _PROJECTOR)}

    def restore(module, incompatible_keys) -> None:
        missing = incompatible_keys.missing_keys
        missing[:] = [name for name in missing if _PROJECTOR not in name]
        del model.sharded_state_dict  # the class's own is back
        hook.remove()

    model.sharded_state_dict = without_projector
    hook = model.register_load_state_dict_post_hook(restore)
