"""Accuracy as an `evaluate` metric module that needs no download: `evaluate.load("examples/metrics/accuracy")`."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


_DESCRIPTION = "Share of predictions that equal their reference."
_INPUTS = """
    predictions (list of int): predicted labels
    references (list of int): true labels
    normalize (bool): the share (default), or the number of correct predictions
    sample_weight (list of float): weight of each sample
Returns:
    accuracy (float): between 0 and 1 if `normalize`
"""


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references, normalize=True, sample_weight=None) -> dict[str, float]:
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}
