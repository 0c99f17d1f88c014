"""ModernALBERT for transformers. Importing this package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_modernalbert import ModernAlbertConfig
from .modeling_modernalbert import (
    ModernAlbertForMaskedLM,
    ModernAlbertForMultipleChoice,
    ModernAlbertForQuestionAnswering,
    ModernAlbertForSequenceClassification,
    ModernAlbertForTokenClassification,
    ModernAlbertModel,
    ModernAlbertPreTrainedModel,
)


AutoConfig.register("modernalbert", ModernAlbertConfig)
ModernAlbertConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, ModernAlbertModel),
    (AutoModelForMaskedLM, ModernAlbertForMaskedLM),
    (AutoModelForMultipleChoice, ModernAlbertForMultipleChoice),
    (AutoModelForQuestionAnswering, ModernAlbertForQuestionAnswering),
    (AutoModelForSequenceClassification, ModernAlbertForSequenceClassification),
    (AutoModelForTokenClassification, ModernAlbertForTokenClassification),
):
    auto_class.register(ModernAlbertConfig, model_class)
    # With this, `save_pretrained` copies the code beside the weights.
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "ModernAlbertConfig",
    "ModernAlbertForMaskedLM",
    "ModernAlbertForMultipleChoice",
    "ModernAlbertForQuestionAnswering",
    "ModernAlbertForSequenceClassification",
    "ModernAlbertForTokenClassification",
    "ModernAlbertModel",
    "ModernAlbertPreTrainedModel",
]
