"""The tasks that a model is fine-tuned and evaluated on."""
