"""A sample of text from the model in training, on any layout.

Each new token passes the whole context through all stages once more; a cache of keys and values
belongs to a command of its own. Drawn with counters, so that every layout draws the same text.
"""

from __future__ import annotations

import torch

from mpmp.job.training import Training
from mpmp.parallel import counter

_TEMPERATURE = 0.8


@torch.no_grad()
def sample(training: Training, prompt: str, num_tokens: int, seed: int) -> str:
    """The prompt and ``num_tokens`` drawn tokens as text, the same on every rank."""
    tokenizer, mesh = training.batches.corpus.tokenizer, training.mesh
    ids = [int(one) for one in tokenizer.encode(prompt)] or [tokenizer.end_of_text or 0]
    key = counter.key_of(seed, "sample")
    context = training.config.model.context
    with training.sharded.whole():
        for number in range(num_tokens):
            # Filled up behind, where nobody attends to it: messages of one length need one plan.
            recent = ids[-context:]
            window = recent + [0] * (context - len(recent))
            logits = training.next_logits(window, len(recent) - 1)
            token = torch.zeros(1, dtype=torch.int64)
            if logits is not None and mesh.tensor.rank == 0:
                token[0] = _draw(logits.double() / _TEMPERATURE, key, number)
            # One rank of the model has drawn it, and the others add nothing.
            ids.append(int(mesh.model.allreduce(token)))
    return tokenizer.decode(ids)


def _draw(logits: torch.Tensor, key: int, number: int) -> int:
    """The largest of logits + Gumbel noise is a draw from their softmax."""
    index = number * len(logits) + torch.arange(len(logits), device=logits.device)
    gumbel = -torch.log(-torch.log(counter.uniform(key, index).clamp_min(1e-300)))
    return int((logits + gumbel).argmax())
