from .tokenization_modernalbert import (
    load_tokenizer,
    padded_vocab_size,
    save_tokenizer,
    train_tokenizer,
    vocabulary_fields,
)


__all__ = ["load_tokenizer", "padded_vocab_size", "save_tokenizer", "train_tokenizer", "vocabulary_fields"]
