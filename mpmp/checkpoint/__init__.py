"""Floor 3: what outlives the job: checkpoints, the exported model, the lock on a run's folder.

    with locked(folder, mesh):
        loaded = load(folder, lambda found: held, mesh)     # held are filled, in any layout
        path = save(folder, step, held, meta, mesh, keep=2)
        export(folder / "model.safetensors", merged, metadata, mesh)

Called by all ranks together; they fail on all alike. No pickle anywhere. Tensors are addressed by
their global name and the part of it that a rank holds (``Held``), never by rank or layout.
"""

from mpmp.checkpoint.alone import ALONE
from mpmp.checkpoint.contents import Contents, Stored
from mpmp.checkpoint.dealing import DamageError, read
from mpmp.checkpoint.exporting import export
from mpmp.checkpoint.held import Held
from mpmp.checkpoint.loading import Found, Loaded, load, look_at, newest, read_step, tensor_files
from mpmp.checkpoint.locking import locked
from mpmp.checkpoint.saving import Saver, save

__all__ = [
    "ALONE",
    "Contents",
    "DamageError",
    "Found",
    "Held",
    "Loaded",
    "Saver",
    "Stored",
    "export",
    "load",
    "locked",
    "look_at",
    "newest",
    "read",
    "read_step",
    "save",
    "tensor_files",
]
