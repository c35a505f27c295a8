"""The `octavo` command: one row per subcommand.

Nothing heavy is imported here; a subcommand imports what it needs when it runs. `config` reads the same
flags as training; the others are plain typed functions, whose arguments tyro reads off their signatures.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.packages import require_own_packages


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives."""

    module: str
    help: str
    functions: tuple[str, ...] = ()
    """Functions for tyro: one is the command itself, several are its own subcommands (``tokenizer train``);
    none means that the module's ``main(argv)`` reads the words itself."""


COMMANDS: dict[str, Command] = {
    "calibrate": Command(
        "trainer.commands.calibrate", "time the model's linears on this GPU: which gain from float8"
    ),
    "checkpoint": Command("trainer.commands.checkpoint", "list, verify, show and prune checkpoints"),
    "config": Command(
        "trainer.commands.config", "show the merged configuration and where each value comes from"
    ),
    "eval": Command("trainer.commands.evaluate", "perplexity of a trained model, or tasks of lm-eval"),
    "export": Command("trainer.commands.export", "write a trained model as a Hugging Face folder"),
    "generate": Command("trainer.commands.generate", "continue prompts with a trained model"),
    "import": Command("trainer.commands.import_hf", "turn a Hugging Face folder into a checkpoint"),
    "plan": Command(
        "trainer.commands.plan", "memory, shapes, communication and time of a run before it starts"
    ),
    "plot": Command("trainer.commands.plot", "draw the curves of one or more runs", ("plot",)),
    "selftest": Command(
        "trainer.commands.selftest", "prove that a killed run resumes exactly on this machine"
    ),
    "tokenize": Command("trainer.commands.tokenize", "turn text into token files", ("tokenize",)),
    "tokenizer": Command("trainer.commands.tokenizer", "train a tokenizer", ("train_tokenizer",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    require_own_packages()
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = argv[0], argv[1:]
    command = COMMANDS.get(name)
    if command is None:
        from trainer.config.errors import EXIT_BAD_INPUT, unknown

        print(f"error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    module = importlib.import_module(command.module)
    if not command.functions:
        return int(module.main(rest))
    return _run_functions(name, [getattr(module, function) for function in command.functions], rest)


def _run_functions(name: str, functions: list, argv: Sequence[str]) -> int:  # type: ignore[type-arg]
    import tyro

    from trainer.config.errors import EXIT_BAD_INPUT

    try:
        if name == "tokenizer":
            table = {function.__name__.partition("_")[0]: function for function in functions}
            tyro.extras.subcommand_cli_from_dict(table, prog=f"octavo {name}", args=list(argv))
        else:
            tyro.cli(
                functions[0],
                config=(tyro.conf.PositionalRequiredArgs,),
                prog=f"octavo {name}",
                args=list(argv),
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: octavo COMMAND [arguments]", "", *rows, "", "octavo COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
