"""What counts as correct: one pure function a task, of a prediction and the answer it should be."""

from __future__ import annotations

from collections.abc import Callable

from scipy.stats import binomtest


def score_text(prediction: str, answer: str) -> dict[str, bool]:
    """`exact` and `startswith`, both without white space at the ends.

    `startswith` also counts a prediction that goes on behind the answer: where it is far above `exact`, the model knows
    the answer and has not learned to stop.
    """
    prediction, answer = prediction.strip(), answer.strip()
    return {"exact": prediction == answer, "startswith": prediction.startswith(answer)}


# Task → the function that scores one prediction. Every task also reports exact, startswith and the stop rate.
TASKS: dict[str, Callable[[str, str], dict[str, bool]]] = {
    "synth": score_text,
    "turk": score_text,
    "text": score_text,
}


def wilson(hits: int, n: int) -> list[float]:
    """The 95 % Wilson score interval of a share of hits, as [low, high] in 0 to 1."""
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return [interval.low, interval.high]
