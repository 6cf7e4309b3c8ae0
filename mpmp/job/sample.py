"""A sample of text from the model in training, on any layout."""

from __future__ import annotations

from mpmp.data.tokens import Tokenizer
from mpmp.job.generation import Generation
from mpmp.job.generation_text import Continuation, Ends
from mpmp.job.training import Training
from mpmp.models.choice import Choice

_TEMPERATURE = 0.8


def sample(
    training: Training, tokenizer: Tokenizer, prompt: str, num_tokens: int, seed: int
) -> str:
    """The prompt and ``num_tokens`` drawn tokens, or what the context has room for, as text.

    The same on every rank: all replicas draw it, for they may share experts.
    """
    context = training.config.model.context
    tokens = [int(one) for one in tokenizer.encode(prompt)] or [tokenizer.end_of_text or 0]
    row = Continuation(0, tokens[: max(1, context - 1)], tokenizer, Ends(num_tokens, context))
    with training.sharded.whole():
        Generation(training.pipeline, training.mesh).run([row], Choice(_TEMPERATURE, seed=seed))
    return prompt + row.text
