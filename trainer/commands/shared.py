"""What the commands that read trained models share: arguments, errors, where the work is done."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer
    from trainer.interop.trained import TrainedModel

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

EXIT_OUT_OF_MEMORY = 3


def run_command(command: Callable[..., object], name: str, argv: Sequence[str]) -> int:
    """Parse `argv` by a command's signature, run it, and turn what the user got wrong into a message.

    Returns:
        The exit code: 0; 2 for bad input; 3 out of device memory; 4 for a checkpoint that cannot be used.
    """
    import tyro

    from trainer.checkpoint.files import EXIT_CHECKPOINT, CheckpointError
    from trainer.config.errors import EXIT_BAD_INPUT

    # Results go to stdout, what is said about them to stderr.
    logging.basicConfig(stream=sys.stderr, format="warning: %(message)s", level=logging.WARNING, force=True)
    try:
        tyro.cli(command, prog=f"octavo {name}", args=list(argv))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CHECKPOINT
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported for its name
            raise
        print(f"error: out of device memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY
    return 0


def at_least(name: str, value: int, least: int = 1) -> None:
    """Refuse a number that is too small.

    Raises:
        ValueError: it is.
    """
    if value < least:
        raise ValueError(f"{name} = {value}; allowed: {least} and more")


def open_model(checkpoint: str, step: int | None, tokenizer: str | None) -> tuple[TrainedModel, Tokenizer]:
    """What the user names as a model, with its tokenizer; no weights are read.

    Raises:
        ValueError: one of them is not there.
        CheckpointError: the model cannot be used.
    """
    from trainer.interop.trained import open_trained, tokenizer_of

    trained = open_trained(checkpoint, step)
    return trained, tokenizer_of(trained, tokenizer)


def warn_beyond(trained: TrainedModel, tokens: int, what: str) -> None:
    """Say so where the model is used on longer sequences than it was made for."""
    if tokens > trained.config.max_seq_len:
        log.warning("%s of %d tokens; the model was made for %d", what, tokens, trained.config.max_seq_len)
