"""Key maps from published weights to SMAUG's parts: plain dictionaries of tensors in, plain dictionaries out."""

from smaug_ds.convert.beit import PIXELS, beit_vision
from smaug_ds.convert.bert import bert, smaug_bert
from smaug_ds.convert.clip import clip_layout, clip_vision
from smaug_ds.convert.singularity import singularity

__all__ = ["PIXELS", "beit_vision", "bert", "clip_layout", "clip_vision", "singularity", "smaug_bert"]
