"""Mean intersection over union as an `evaluate` metric module that needs no download:
`evaluate.load("examples/metrics/mean_iou")`."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "Intersection over union of predicted and true segments, averaged over the classes that occur."
_INPUTS = """
    predictions (list of int): the predicted class of each pixel
    references (list of int): the true class of each pixel
    num_labels (int): the number of classes
    ignore_index (int): pixels of this reference are left out
Returns:
    mean_iou (float): between 0 and 1
    per_class_iou (list of float): NaN for classes that neither are predicted nor occur
"""


class MeanIoU(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references, num_labels, ignore_index=255) -> dict[str, object]:
        found, true = np.asarray(predictions), np.asarray(references)
        found, true = found[true != ignore_index], true[true != ignore_index]
        pairs = np.bincount(true * num_labels + found, minlength=num_labels**2).reshape(num_labels, num_labels)
        both = np.diag(pairs).astype(float)
        either = pairs.sum(0) + pairs.sum(1) - both
        per_class = np.divide(both, either, out=np.full(num_labels, np.nan), where=either > 0)
        return {"mean_iou": float(np.nanmean(per_class)), "per_class_iou": per_class.tolist()}
