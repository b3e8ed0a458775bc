"""RSA without Megatron: for jobs on transformers' Trainer, or a trainer that is built on it (TRL's SFTTrainer)."""

from rsa_megatron.huggingface.families import Family
from rsa_megatron.huggingface.trainer import RSATrainerMixin

__all__ = ["Family", "RSATrainerMixin"]
