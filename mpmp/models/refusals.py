"""What cannot be: layouts that leave ranks without work, settings that contradict each other."""

from __future__ import annotations

import os
import shutil

from mpmp import config
from mpmp.comm.mesh import Mesh
from mpmp.errors import ConfigError, LayoutError


def refuse(
    settings: config.Config, mesh: Mesh, vocabulary: int, *, splits: bool, tags: int = 0
) -> None:
    """Raise what models know to be wrong; ``splits``: the schedule splits backward."""
    refuse_model(settings.model, mesh, vocabulary, tags)
    if settings.train.compile:
        _refuse_compiled(settings, splits)


def refuse_model(model: config.Model, mesh: Mesh, vocabulary: int, tags: int = 0) -> None:
    """LayoutError where a rank would have nothing of some layer, or of the sequences."""
    if mesh.context.size > model.context:
        raise LayoutError(
            f"layout {mesh.layout} has more context ranks ({mesh.context.size}) than a sequence "
            f"has tokens ({model.context}); use at most {model.context} context ranks"
        )
    cut = {"hidden units": model.num_hidden, "tokens": vocabulary}
    if model.kind != "mlp":
        cut["heads"] = model.heads
    if tags:
        cut["tags"] = tags
    what = min(cut, key=lambda name: cut[name])
    if mesh.tensor.size > cut[what]:
        raise LayoutError(
            f"layout {mesh.layout} has more tensor ranks ({mesh.tensor.size}) than the model has "
            f"{what} ({cut[what]}); use at most {cut[what]} tensor ranks"
        )


def _refuse_compiled(settings: config.Config, splits: bool) -> None:
    """ConfigError where blocks cannot go through the compiler."""
    schedule, why = settings.parallel.schedule, ""
    if splits:
        why = f"--parallel.schedule {schedule} leaves weight gradients for later, but a compiled "
        why += "backward computes them at once; take another schedule"
    elif settings.model.experts:
        why = f"--model.experts {settings.model.experts} sends tokens in numbers that are known at "
        why += "run time only, but a compiled block has fixed ones; take --model.experts 0"
    elif settings.train.recompute == "selective":
        why = (
            "--train.recompute selective works inside a block, which is compiled as one; take full"
        )
    if why:
        raise ConfigError(f"{why} or leave out --train.compile")
    if not _can_compile():
        raise ConfigError(
            "--train.compile needs a C++ compiler, and no g++, clang++ or CXX is found; install "
            "one or leave out --train.compile"
        )


def _can_compile() -> bool:
    """Whether torch finds the compiler that it needs for blocks on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
