"""What per-op selective checkpointing keeps in eager mode, where no hook of autograd sees it."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from parallelisms import activation_checkpoint


@contextmanager
def policies_recorded():
    """Yields a list that grows by the contexts of each forward of a block."""
    made = []

    def record(policy):
        made.append(create_selective_checkpoint_contexts(policy))
        return made[-1]

    with mock.patch.object(activation_checkpoint, "create_selective_checkpoint_contexts", record):
        yield made


def kept_tensors(contexts):
    """The tensors that one forward's contexts hold until backward, each storage once."""
    found = {}

    def look(value):
        value = getattr(value, "val", value)
        if isinstance(value, torch.Tensor):
            found.setdefault(value.untyped_storage().data_ptr(), value)
        elif isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            for item in value:
                look(item)

    look(contexts[0].storage)
    return list(found.values())
