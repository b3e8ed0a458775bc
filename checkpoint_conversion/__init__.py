"""Checkpoints from Hugging Face to Megatron and back: python -m checkpoint_conversion --help."""
