"""Translution for Hugging Face Transformers: importing this package registers the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration.configuration_translution import TranslutionConfig
from .modeling.mixers.layer import TranslutionAttention
from .modeling.models.backbone import TranslutionBackbone
from .modeling.models.masked_image_modeling import TranslutionForMaskedImageModeling
from .modeling.models.modeling_translution import (
    TranslutionForCausalLM,
    TranslutionForImageClassification,
    TranslutionModel,
    TranslutionPreTrainedModel,
)
from .modeling.models.quantization import quantize_int8
from .modeling.models.text_classification import (
    TranslutionForSequenceClassification,
    TranslutionForTokenClassification,
)
from .modeling.operators.dispatch import explain_dispatch


AutoConfig.register(TranslutionConfig.model_type, TranslutionConfig, exist_ok=True)
AutoModel.register(TranslutionConfig, TranslutionModel, exist_ok=True)
AutoModelForImageClassification.register(TranslutionConfig, TranslutionForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(TranslutionConfig, TranslutionForMaskedImageModeling, exist_ok=True)
AutoModelForCausalLM.register(TranslutionConfig, TranslutionForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TranslutionConfig, TranslutionForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(TranslutionConfig, TranslutionForTokenClassification, exist_ok=True)
AutoBackbone.register(TranslutionConfig, TranslutionBackbone, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "TranslutionAttention",
    "TranslutionBackbone",
    "TranslutionConfig",
    "TranslutionForCausalLM",
    "TranslutionForImageClassification",
    "TranslutionForMaskedImageModeling",
    "TranslutionForSequenceClassification",
    "TranslutionForTokenClassification",
    "TranslutionModel",
    "TranslutionPreTrainedModel",
    "explain_dispatch",
    "quantize_int8",
]
