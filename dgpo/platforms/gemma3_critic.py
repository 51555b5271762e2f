"""Gemma 3 as a critic: transformers 5.9 has a head of one value per token for our other families, not for this one."""

from transformers import AutoModelForTokenClassification, Gemma3TextConfig
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.gemma3.modeling_gemma3 import Gemma3PreTrainedModel


class Gemma3TextForTokenClassification(GenericForTokenClassification, Gemma3PreTrainedModel):
    """The text model and a linear head of `num_labels` values per token."""

    config: Gemma3TextConfig  # transformers reads the class itself: no deferred annotations in this file
    input_modalities = ("text",)


AutoModelForTokenClassification.register(Gemma3TextConfig, Gemma3TextForTokenClassification, exist_ok=True)
