"""The command line: which command is which module, and how failures leave. A command's module is only
imported when it is called, so `moiety --help` is instant.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from moiety.errors import MoietyError, UsageError

__all__ = ["COMMANDS", "main", "version"]

COMMANDS = {
    "demo": "train a small MoE and its dense twin on real text, compare them, open the report",
    "train": "train a model on your text, or resume a run",
    "finetune": "train a model further on chats, pairs of answers or texts",
    "compare": "train an MoE against its dense twin, or router against router, over several seeds",
    "upcycle": "make a Mixture-of-Experts of a dense model, with proof of what the method keeps",
    "dense": "make one dense model of a Mixture-of-Experts, its experts averaged",
    "eval": "score a model on held-out text, also in fewer bits, or on public tasks",
    "generate": "continue a prompt with a trained model",
    "chat": "talk to a model, line by line",
    "serve": "answer requests over HTTP, as clients of OpenAI expect it",
    "inspect": "say what the routers of a model, a run or a trace do, and draw it",
    "trace": "show which experts each token of a prompt went to, and why",
    "gradients": "check that every router and expert of a model gets a gradient",
    "routers": "list the routers there are, or explain one",
    "params": "count parameters, FLOPs and bytes of a known model or a checkpoint",
    "plan": "plan memory, speed and cost before a run, or measure this machine",
    "models": "list the well-known models: exact counts, and what was said about closed ones",
    "convert": "write a model in another format: the layout of transformers, or GGUF",
    "quantize": "pack a model's weights in fewer bits, with a receipt",
    "adapter": "show what a LoRA adapter adds, check that it acts, or merge it",
    "prune": "drop the experts that matter least, with what that costs",
    "merge": "merge experts that are alike, with what that costs",
    "bench": "measure how fast a model is, against this machine's limits",
    "pull": "fetch a model of the Hugging Face hub into its cache",
    "ls": "list the models on this machine",
    "doctor": "say what this machine offers, which parts are used, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 used wrongly, 3 something is missing on this machine, 4 a check said no,
        130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except MoietyError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted", None)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(version())
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `moiety {close[0]}`?" if close else "`moiety --help` lists the commands"
        raise UsageError(f"there is no command {name!r}", hint=hint)
    from cyclopts import CycloptsError

    app = importlib.import_module(f"moiety.cli.{name}").app
    try:
        result = app(rest, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise UsageError(str(error).strip(), hint=f"`moiety {name} --help` lists the options") from None
    return int(result or 0)


def version() -> str:
    """The installed program's version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("moiety")
    except PackageNotFoundError:
        return "unknown: this is a checkout that was never installed"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "moiety: build, train and look inside Mixture-of-Experts transformers",
            "",
            "usage: moiety COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`moiety COMMAND --help` explains one. Results go to stdout, talk to stderr.",
        ]
    )


def _complain(message: str, hint: str | None) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint is not None:
        print(f"hint: {hint}", file=sys.stderr)
