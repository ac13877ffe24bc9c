"""Supervised fine-tuning of language models with LoRA, composed by Hydra."""

__version__ = "0.1.0"
