"""Go on with the other images where one fails, and name all that failed at the end."""

import sys
from typing import Any

from monai.data.dataset import Dataset
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.utils import IterationEvents

from mednca_monai.checks import check_finite

FAILURE = "failure"


def reason(path: object, error: Exception) -> str:
    """What failed and why, in one line."""
    while str(error).startswith("applying transform") and isinstance(error.__cause__, Exception):
        error = error.__cause__  # MONAI's frame around the error
    first, *more = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {first}" + (f" ... {more[-1]}" if more else "")
    return text if str(path) in text else f"'{path}': {text}"


class FailSafeDataset(Dataset):
    """``monai.data.Dataset`` of images whose item is a message, "failure", where one fails."""

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            return {FAILURE: reason(self.data[index]["image"], error)}


def check_prediction(engine: Any) -> None:
    """Raise ValueError where a prediction, or a part of it, holds NaN or infinite values."""
    prediction = engine.state.output["pred"]
    parts = prediction if isinstance(prediction, dict) else {"logits": prediction}
    for name, values in parts.items():
        check_finite(name, values)


class FailedImagesError(RuntimeError):
    """Images that failed, with the reason for each."""


class FailSafeEvaluator(SupervisedEvaluator):
    """``monai.engines.SupervisedEvaluator`` of a `FailSafeDataset`, in batches of one image.

    An image that cannot be read, segmented or saved, or of which the weights make NaN or infinite
    values, is logged, and the next one follows.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, check_prediction)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Segment all images; the argument is the stock evaluator's.

        Raises:
            FailedImagesError: at the end, where there are any.
        """
        self.failures: list[str] = []
        super().run(global_epoch)
        if self.failures:
            count = f"{len(self.failures)} of {self.state.epoch_length} images failed"
            raise FailedImagesError("\n".join([f"{count}, all others are done:", *self.failures]))

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:
        try:
            if FAILURE not in batchdata:
                return super()._iteration(engine, batchdata)
            (message,) = batchdata[FAILURE]
        except Exception as error:
            (path,) = batchdata["image"].meta["filename_or_obj"]
            message = reason(path, error)
        self.logger.error(message)
        self.failures.append(message)
        return {}


def run(evaluator: FailSafeEvaluator) -> None:
    """Run an evaluator as a program, whose output ends with the list of what failed.

    MONAI's runner would wrap a `FailedImagesError` in errors of its own.

    Raises:
        SystemExit: with this list, and exit code 1, where images failed.
    """
    try:
        evaluator.run()
    except FailedImagesError as error:
        sys.exit(str(error))
