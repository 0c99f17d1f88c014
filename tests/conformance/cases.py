"""transformers' own tests of a model, on our classes and, for comparison, on ModernBERT's: one tester for both."""

import unittest

import transformers
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

import modernalbert


HEADS = ("Model", *(f"For{task}" for task in ("MaskedLM", "SequenceClassification", "TokenClassification")))
HEADS += ("ForQuestionAnswering", "ForMultipleChoice")

# The tests look classes up by name, to know which labels they take and which is the base model.
for name, mapping in vars(modeling_auto).items():
    if name.endswith("_MAPPING_NAMES") and "modernbert" in mapping:
        mapping["modernalbert"] = mapping["modernbert"].replace("ModernBert", "ModernAlbert")


class Tester:
    """What the library's tests ask of a model's tester: sizes, a tiny configuration, a random batch."""

    is_training = True
    batch_size, seq_length = 13, 7
    num_labels, num_choices = 3, 4
    vocab_size, hidden_size, num_attention_heads, num_hidden_layers = 99, 32, 4, 2
    own_fields = {}

    def __init__(self, config_class, causal_lm_class, **fields):
        self.config_class, self.causal_lm_class, self.fields = config_class, causal_lm_class, fields
        self.num_hidden_layers = fields["num_hidden_layers"]

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=512,
            pad_token_id=0,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class EncoderTests(ModelTesterMixin, TrainingTesterMixin):
    model_tester = None

    def setUp(self):
        config_class = self.all_model_classes[0].config_class
        self.model_tester = Tester(config_class, self.all_model_classes[1], **self.fields)
        self.config_tester = ConfigTester(self, config_class=config_class, hidden_size=36)

    def test_config(self):
        self.config_tester.run_common_tests()


class ModernBert(EncoderTests, unittest.TestCase):
    all_model_classes = tuple(getattr(transformers, f"ModernBert{head}") for head in HEADS)
    fields = {"num_hidden_layers": 2}


class ModernAlbert(EncoderTests, unittest.TestCase):
    all_model_classes = tuple(getattr(modernalbert, f"ModernAlbert{head}") for head in HEADS)
    fields = {
        **{"num_hidden_layers": 4, "num_hidden_groups": 2, "embedding_size": 16},
        **{"mol_groups": [1], "mol_intermediate_size": 41, "num_experts": 4, "num_experts_per_tok": 2, "expert_rank": 3},
    }
