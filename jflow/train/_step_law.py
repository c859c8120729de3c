"""The step law: a learning rate and a batch size from the sizes of a model and its data."""

import math
from typing import NamedTuple

__all__ = ["StepLaw", "step_law"]

_PARAMS, _TOKENS = (2.14e8, 1.08e9), (4e9, 1e11)  # of the dense models that were trained


class StepLaw(NamedTuple):
    """What `step_law` returns.

    Attributes:
        learning_rate: The peak learning rate of AdamW.
        batch_tokens: The tokens of a batch.
        in_range: Whether the law was fitted there. Elsewhere the numbers are extrapolated.
    """

    learning_rate: float
    batch_tokens: float
    in_range: bool


def step_law(params: float, tokens: float) -> StepLaw:
    """The best learning rate and batch size of a language model, by a law fitted to thousands.

    Also known as: Predictable Scale.

        learning_rate = 1.79 params^(-0.713) tokens^0.307,     batch_tokens = 0.58 tokens^0.571

    It is for autoregressive language models, trained by AdamW with a warm-up and a cosine decay to
    1e-5. For flows nobody has shown it: there it is a first guess, around which a sweep begins.

    Args:
        params: the number of params without embeddings.
        tokens: the number of tokens of the whole training.

    Returns:
        StepLaw: the two numbers, and whether params are in [2.14e8, 1.08e9] and tokens in
            [4e9, 1e11], where the released runs of dense models are.

    Raises:
        ValueError: A number is not positive and finite.

    Examples:
        >>> from jflow import train
        >>> law = train.step_law(1e9, 1e11)
        >>> round(law.learning_rate, 5), round(law.batch_tokens), law.in_range
        (0.00163, 1107715, True)

    References:
        Li, Zheng, Wang, Zhang, Wang, et al., *Predictable Scale: Part I, Step Law -- Optimal
            Hyperparameter Scaling Law in Large Language Model Pretraining*, 2025, arXiv:2503.04715.
            The range is that of the runs in the authors' repository, step-law/steplaw.
    """
    for what, number in (("params", params), ("tokens", tokens)):
        if not 0 < number < math.inf:
            raise ValueError(f"step_law: expected positive finite {what}, got {number}")
    ranges = (params, _PARAMS), (tokens, _TOKENS)
    return StepLaw(
        1.79 * params**-0.713 * tokens**0.307,
        0.58 * tokens**0.571,
        all(low <= number <= high for number, (low, high) in ranges),
    )
