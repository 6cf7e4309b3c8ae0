"""Floor 3: what outlives the job: checkpoints, the exported model, the lock on a run's folder.

    with locked(folder, mesh):
        loaded = load(folder, mesh)
        path = save(folder, step, tensors, meta, mesh, keep=2)
        export(folder / "model.safetensors", merged, metadata, mesh)

All four are called by all ranks together and fail on all alike. No pickle anywhere.
"""

from mpmp.checkpoint.exporting import export
from mpmp.checkpoint.loading import Loaded, load
from mpmp.checkpoint.locking import locked
from mpmp.checkpoint.saving import save

__all__ = ["Loaded", "export", "load", "locked", "save"]
