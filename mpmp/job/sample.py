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
    tokenizer = training.batches.corpus.tokenizer
    group, device = training.mesh.pipeline, training.mesh.world.device
    ids = [int(one) for one in tokenizer.encode(prompt)] or [tokenizer.end_of_text or 0]
    key = counter.key_of(seed, "sample")
    context = training.config.model.context
    for number in range(num_tokens):
        # Filled up behind, where nobody attends to it: messages of one length need one plan.
        recent = ids[-context:]
        window = torch.tensor([recent + [0] * (context - len(recent))], device=device)
        hidden = training.pipeline.hidden(window)
        token = torch.zeros(1, dtype=torch.int64, device=device)
        if training.mesh.is_last_stage:
            last = hidden[:, len(recent) - 1 : len(recent)]
            logits = training.stage.logits(last)[0, 0].double() / _TEMPERATURE
            index = number * len(logits) + torch.arange(len(logits), device=device)
            # The largest of logits + Gumbel noise is a draw from their softmax.
            gumbel = -torch.log(-torch.log(counter.uniform(key, index).clamp_min(1e-300)))
            token[0] = (logits + gumbel).argmax()
        ids.append(int(group.broadcast(token, root=group.size - 1)))
    return tokenizer.decode(ids)
