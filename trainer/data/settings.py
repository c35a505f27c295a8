"""From the configuration's sections to the loader's arguments. Torch-free."""

from __future__ import annotations

from typing import Any


def loader_settings(config: Any, name: str) -> dict[str, Any]:
    """What the section ``training`` or ``validation`` says to `trainer.data.loader.build_dataloader`.

    How documents become a stream (bos, eos, bad data) is the training's in both: a model is validated on
    what it was trained on.
    """
    section, training = getattr(config, name), config.training
    return {
        "dataset": section.dataset,
        "dataset_path": section.dataset_path,
        "text_field": section.text_field,
        "mixture": training.mixture if name == "training" else [],
        "bad_data": training.bad_data,
        "add_bos": training.add_bos,
        "add_eos": training.add_eos,
        "seq_len": section.seq_len,
        "local_batch_size": section.local_batch_size,
        "prefetch_factor": section.dataloader.prefetch_factor,
        "num_workers": section.dataloader.num_workers,
    }


def describe_data(config: Any) -> str:
    """Where the training text is from, for the start-up log."""
    training = config.training
    return ", ".join(training.mixture) or training.dataset_path or training.dataset
