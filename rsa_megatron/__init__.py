"""The RSA loss for LLaVA-style training on Megatron-Core: RSAPlugin for a training script, rsa_loss for anything else."""

from rsa_megatron.config import RSAConfig

__version__ = "0.2.0"
__all__ = ["RSAConfig", "RSAPlugin", "rsa_loss"]


def __getattr__(name: str):
    # Loaded when asked for: the settings need nothing, the loss needs torch, the plugin megatron.core.
    if name == "rsa_loss":
        from rsa_megatron.alignment.loss import rsa_loss

        return rsa_loss
    if name == "RSAPlugin":
        from rsa_megatron.plugin import RSAPlugin

        return RSAPlugin
    raise AttributeError(f"module 'rsa_megatron' has no attribute {name!r}")
