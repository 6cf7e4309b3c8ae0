"""What ``mpmp.generate`` can be told; nothing here needs torch or MPI."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpmp.config import Comm, parse_layout
from mpmp.errors import ConfigError, InputOutputError, LayoutError

_LARGEST_PROMPTS = 64 << 20
_COLDEST = 1e-6
"""Of a nearly 0 logits overflow, long after only the likeliest token is drawn."""


@dataclass(frozen=True)
class Generate:
    """A model, prompts, and how they are continued."""

    checkpoint: str = ""
    """A run's folder, one of its steps, a merged model.safetensors, or a Hugging Face folder."""
    prompt: tuple[str, ...] = ()
    """Text to continue; may be given several times."""
    prompts: str | None = None
    """A text file with a prompt on each line."""
    tokens: int = 100
    """Most tokens that are added to each prompt."""
    temperature: float = 0.8
    """Divides the logits before a draw; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; omitted: from all."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest tokens that have this share of the probability."""
    seed: int = 1
    """Key of the draws."""
    stop: tuple[str, ...] = ()
    """Text that ends a continuation and is not shown; may be given several times."""
    end: bool = True
    """An end-of-text token ends a continuation, too."""
    layout: str | None = None
    """Axes of the ranks, as dp2.pp2.tp2; replicas share out the prompts. Omitted: all replicas."""
    tokenizer: str | None = None
    """A tokenizer file; omitted: the one beside the weights, or bytes."""
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto takes a GPU where there is one."""
    json: str | None = None
    """File that takes texts, tokens and speeds, too."""
    comm: Comm = field(default_factory=Comm)
    """How bytes travel."""

    def __post_init__(self) -> None:
        def require(holds: bool, sentence: str) -> None:
            if not holds:
                raise ConfigError(sentence)

        require(self.tokens >= 1, f"--tokens must be at least 1, not {self.tokens}")
        require(
            self.temperature == 0 or _COLDEST <= self.temperature < float("inf"),
            f"--temperature must be 0 or at least {_COLDEST}, not {self.temperature}",
        )
        require(self.top_k is None or self.top_k >= 1, f"--top-k must be at least 1: {self.top_k}")
        require(0 < self.top_p <= 1, f"--top-p must lie in (0, 1], not {self.top_p}")
        require("" not in self.stop, "--stop needs a text; every text ends with an empty one")
        _ = self.axes  # a wrong layout is refused now

    @property
    def axes(self) -> dict[str, Any]:
        """Sizes of the axes; ConfigError or LayoutError for what generation has no use for."""
        if self.layout is None:
            return {}
        found = parse_layout(self.layout)
        useless = {
            "context": "cp cuts a sequence, of which a step of generation has one token",
            "expert": "ep makes replicas wait for each other, which have prompts of their own",
            "sequence": "sp cuts a sequence, of which a step of generation has one token",
            "zero": "zero shares out the state of an optimiser, and there is none",
        }
        defaults: dict[str, Any] = {"context": 1, "expert": 1, "sequence": False, "zero": 0}
        for name, why in useless.items():
            if found.pop(name) != defaults[name]:
                raise LayoutError(f"layout {self.layout}: {why}; take dp, pp and tp only")
        return found

    def texts(self) -> list[str]:
        """All prompts, a file read; ConfigError or InputOutputError where that cannot be."""
        found = list(self.prompt)
        if self.prompts is not None:
            try:
                if Path(self.prompts).stat().st_size > _LARGEST_PROMPTS:
                    raise ConfigError(f"--prompts {self.prompts} is longer than 64 MiB")
                text = Path(self.prompts).read_text(encoding="utf-8-sig")
                # Other signs at which Python ends a line are part of a prompt.
                found += text.removesuffix("\n").split("\n") if text else []
            except (OSError, UnicodeDecodeError) as error:
                raise InputOutputError(
                    f"--prompts {self.prompts} cannot be read ({error}); give a text file"
                ) from None
        if not found:
            raise ConfigError(f"nothing to continue; --prompts {self.prompts} is empty")
        for number, one in enumerate(found, 1):
            if not one.isascii() and any("\ud800" <= sign <= "\udfff" for sign in one):
                raise ConfigError(
                    f"prompt {number} has bytes that are not UTF-8; set the terminal to UTF-8, or "
                    "give the text by --prompts FILE"
                )
        return found
