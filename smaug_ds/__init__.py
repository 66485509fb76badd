"""SMAUG-DS: DeepSpeed-optimised video-language pre-training with masked autoencoding and sparse tokens."""

__version__ = "0.1.0"
