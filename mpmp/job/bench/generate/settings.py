"""What ``mpmp.bench generate`` can be told; nothing here needs torch or MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpmp.config import Model
from mpmp.errors import ConfigError
from mpmp.programs.tables import look_up


@dataclass(frozen=True)
class Size:
    """A GPT of random weights."""

    model: Model
    vocabulary: int


SIZES = {
    "small": Size(Model(layers=2, heads=4, width=192, context=128), 257),
    "gpt2": Size(Model(layers=12, heads=12, width=768, context=1024), 50_257),
}
"""Two layers of the default width on bytes, and GPT-2 (Radford et al. 2019)."""


@dataclass(frozen=True)
class GenerateTokens:
    """The models, and how long each is measured."""

    against: Literal["transformers", "nothing"] = "transformers"
    """Whose generate runs in turns with ours, on the same weights."""
    sizes: str = "small,gpt2"
    """Names with commas between: small (2 layers x 192), gpt2 (12 x 768, vocabulary 50,257)."""
    prompt: int = 16
    """Tokens of the prompt."""
    tokens: int = 64
    """Tokens that are added to it, each the likeliest."""
    repeats: int = 7
    """Pairs of turns; one goes before them to warm up."""
    threads: int = 1
    csv: str | None = None
    """File that takes the rows, too."""

    def __post_init__(self) -> None:
        for name in ("prompt", "tokens", "repeats", "threads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")
        for name in self.names:
            context = look_up(SIZES, name, "size").model.context
            if self.prompt + self.tokens > context:
                raise ConfigError(
                    f"--prompt {self.prompt} and --tokens {self.tokens} are more than the context "
                    f"of {name}, {context}; take fewer"
                )

    @property
    def names(self) -> list[str]:
        """Sizes that are measured."""
        found = [name.strip() for name in self.sizes.split(",") if name.strip()]
        if not found:
            raise ConfigError(f"--sizes needs names with commas between, not {self.sizes!r}")
        return list(dict.fromkeys(found))
