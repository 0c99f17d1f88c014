"""transformers' common tests of a model, on our classes and, to compare with, on ModernBERT's: one tester for both.

`run.py` puts the library's `tests` package on the path first. Its pipeline tests are not among them: they need files
that the source distribution leaves out, and models from the Hub; `tests/test_hub.py` runs the pipelines.
"""

import unittest
from unittest.mock import patch

import transformers
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from tests.test_training_mixin import TrainingTesterMixin
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

import modernalbert
from modernalbert import ModernAlbertModel, ModernAlbertPreTrainedModel


HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)

# The tests look a class up by its name, to know which labels it takes and whether it is a base model.
for mapping_name, mapping in vars(modeling_auto).items():
    if mapping_name.endswith("_MAPPING_NAMES") and "modernbert" in mapping:
        mapping["modernalbert"] = mapping["modernbert"].replace("ModernBert", "ModernAlbert")


class Tester:
    """What the tests ask about a model: sizes, a tiny configuration, a random batch with padding anywhere."""

    is_training = True
    batch_size, seq_length, num_choices = 13, 7, 4
    vocab_size, hidden_size, num_attention_heads = 99, 32, 4

    def __init__(self, model_classes, fields):
        self.config_class = model_classes[0].config_class
        self.causal_lm_class = model_classes[1]  # the training test's name for the class that it trains
        self.fields = dict(fields)
        self.num_hidden_layers = fields["num_hidden_layers"]

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=512,
            initializer_range=0.2,  # under the usual 0.02 attention is so even that a wrong one passes
            **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {"input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size)}
        inputs["attention_mask"] = random_attention_mask(inputs["input_ids"].shape)
        return self.get_config(), inputs


class CommonTests(ModelTesterMixin, TrainingTesterMixin):
    model_tester = None
    adapted = {}

    def setUp(self):
        self.model_tester = Tester(self.all_model_classes, self.fields)
        config_class = self.model_tester.config_class
        self.config_tester = ConfigTester(self, config_class=config_class, hidden_size=32, num_attention_heads=4)
        for name, (_, adapt) in self.adapted.items():
            if self._testMethodName.startswith(name):
                adapt(self)

    def test_config(self):
        self.config_tester.run_common_tests()

    def replace(self, owner, attribute, value):
        patcher = patch.object(owner, attribute, value)
        patcher.start()
        self.addCleanup(patcher.stop)


class ModernBert(CommonTests, unittest.TestCase):
    all_model_classes = tuple(getattr(transformers, f"ModernBert{head}") for head in HEADS)
    fields = {"num_hidden_layers": 2}


class ModernAlbert(CommonTests, unittest.TestCase):
    all_model_classes = tuple(getattr(modernalbert, f"ModernAlbert{head}") for head in HEADS)
    fields = {
        "embedding_size": 16,
        "num_hidden_layers": 4,
        "num_hidden_groups": 2,
        "mol_groups": [1],
        "mol_intermediate_size": 41,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_rank": 3,
    }
    training_overfit_steps = 600  # copying 99 tokens through an embedding of width 16 takes more than 300
    # Where we differ from the library on purpose: why, and what makes the rest of the test run.
    adapted = {
        "test_num_layers_is_small": (
            "it bounds the cost of a tester by 2 layers; ours has 2 blocks, and runs each twice",
            lambda self: setattr(self.model_tester, "num_hidden_layers", self.fields["num_hidden_groups"]),
        ),
        "test_model_rope_scaling_from_config": (
            "it runs a sequence longer than `max_position_embeddings` without scaled RoPE; we refuse that",
            lambda self: self.replace(ModernAlbertModel, "check_length", lambda *_: None),
        ),
        "test_model_weights_reload_no_missing_tied_weights": (
            "it loads a checkpoint without any tensor of the encoder; we refuse that",
            lambda self: self.replace(
                ModernAlbertPreTrainedModel, "from_pretrained", classmethod(PreTrainedModel.from_pretrained.__func__)
            ),
        ),
        "test_training_gradient_checkpointing_use_reentrant_true": (
            "reentrant checkpointing takes the gradient from the balancing loss; we refuse the two together",
            lambda self: self.model_tester.fields.update(router_aux_loss_coef=0),
        ),
    }


class ModernAlbertSliding(ModernAlbert):
    """The same with sliding layers, which the default has none of.

    All runs of a block have one type, since the checkpointing test recomputes them all with the arguments of the last.
    """

    layer_types = ["sliding_attention"] * 2 + ["full_attention"] * 2
    fields = {**ModernAlbert.fields, "layer_types": layer_types, "local_attention": 4}


# By column of the table.
OURS = {"ours": ModernAlbert, "sliding": ModernAlbertSliding}
MODERNBERT = {"ModernBERT": ModernBert}
