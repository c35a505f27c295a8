"""A module for experimental.custom_import that kills a rank inside a save.

    KILL_AT="STAGE STEP RANK"

STAGES has what can be named. The module changes nothing but that: each stage is a function of the checkpoint
package, before or after whose call, in the save of that step, the process sends SIGKILL to itself.
"""

import os
import signal

from trainer.checkpoint import files, folders, integrity, writer
from trainer.checkpoint import saving as saving_module

MODELS: dict = {}  # a module without tables is refused

STAGES = {
    "planned": (writer, "write_checkpoint", "before"),
    "folder made": (folders, "new_temporary", "after"),
    "first block": (files.NewFile, "write", "after"),
    "tensors written": (files.NewFile, "close", "before"),
    "tensors synced": (files.NewFile, "close", "after"),
    "before the manifest": (writer, "write_durably", "before"),
    "before integrity": (writer, "seal", "before"),
    "before the marker": (integrity, "_digest", "before"),
    "before the rename": (folders, "publish", "before"),
    "after the rename": (folders, "publish", "after"),
    "before pruning": (folders, "prune", "before"),
    "while pruning": (folders, "remove", "before"),
}


def kill_at(stage, step, rank):
    """Install the trap."""
    saving = []
    write = saving_module.Saver.write

    def watched(self, tensors, manifest, *args, **kwargs):
        if manifest.step == step:  # the save before it has ended: nothing is under way
            saving.append(step)
        return write(self, tensors, manifest, *args, **kwargs)

    saving_module.Saver.write = watched
    place, name, when = STAGES[stage]
    call = getattr(place, name)

    def trap(*args, **kwargs):
        if saving and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if saving:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, trap)
    if place is writer and name == "write_checkpoint":
        saving_module.write_checkpoint = trap
    assert int(os.environ["RANK"]) == rank


if "KILL_AT" in os.environ and "RANK" in os.environ:
    stage, step, rank = os.environ["KILL_AT"].rsplit(" ", 2)
    if os.environ["RANK"] == rank:
        kill_at(stage, int(step), int(rank))
