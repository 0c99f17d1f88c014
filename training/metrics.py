"""Metrics of the GLUE tasks, computed without network."""

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


# Columns of the two texts, and the metrics in the order that GLUE reports them.
GLUE_TASKS = {
    "cola": (("sentence", None), ("matthews_correlation",)),
    "sst2": (("sentence", None), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}

METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


def compute_metrics(names: tuple[str, ...], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Named metrics, each from 0 or -1 to 1, of class logits `[examples, classes]` or predicted values `[examples, 1]`."""
    predictions = logits.argmax(axis=-1) if logits.shape[-1] > 1 else logits.squeeze(-1)
    return {name: float(METRICS[name](labels, predictions)) for name in names}
