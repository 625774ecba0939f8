"""Entry point: `alter-demo COMMAND`, or `python -m alter_demo COMMAND`."""

import argparse
import os
import shlex
import sys
import warnings

from ..errors import UserError
from . import experiments, runs  # noqa: F401  their commands register themselves
from .commands import COMMANDS, HelpFormatter, add_config_options

EXAMPLES = """examples:
  alter-demo unlearn --forget harry-potter
  alter-demo unlearn --forget my_data.csv --retain keep.csv --name mine
  alter-demo compare runs/mine "Who wrote the Harry Potter books?" "Who wrote The Hobbit?"
  alter-demo inspect "Harry Potter goes to school at Hogwarts." --run runs/mine
  alter-demo bench --json
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for an error to correct, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.typed = shlex.join(["python", "-m", "alter_demo", *argv])
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = COMMANDS[args.command]
    try:
        command.run(args)
        return 0
    except KeyboardInterrupt:
        print(f"alter_demo: Interrupted. {command.kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        message = str(error)
    except MemoryError:
        message = "Out of memory. Use a smaller model or batch size."
    print(f"alter_demo: {message}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="alter-demo",
        description="Make a language model forget something chosen, and only that (ALTER).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(required=True, metavar="command", dest="command")
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        sub = subparsers.add_parser(
            name, help=text, description=text, formatter_class=HelpFormatter
        )
        for names, options in command.arguments:
            sub.add_argument(*names, **options)
        if command.config:
            add_config_options(sub, **command.config)
    return top
