"""One way from the command line to a validated config: dataclass defaults < `--config file.py` < flags.

A script defines one dataclass; the comment behind each field is its help text. `run(main, Config)` parses, calls
`main(config)` and turns a UserError into one line and exit code 2. `--top_k 5` and `--top-k 5` both work, and
booleans take true/false. Parsing is simple-parsing's (argparse underneath); we add config files and short errors.

    @dataclass
    class Config:
        depth: int = 6  # number of layers

    if __name__ == "__main__":
        run(main, Config)
"""

import ast
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import simple_parsing
from simple_parsing.wrappers.field_wrapper import DashVariant

from nanochat.common import UserError, cleanup_distributed


class _Parser(simple_parsing.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message.replace("argument ", "", 1))


def load_config_file(path: str | Path) -> dict[str, Any]:
    """The plain assignments of a configs/*.py file: `name = literal` (arithmetic on numbers is fine too).

    The file is read, not executed: a config can't run code. Raises UserError naming the line of anything else.
    """
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from e
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:  # the last two: nested thousands deep
        raise UserError(f"the config {path} is not valid Python: {e}") from e
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{path}, line {node.lineno}: only plain assignments such as depth = 6 belong in a config")
        values[node.targets[0].id] = _evaluate(node.value, path)
    return values


def _evaluate(node: ast.expr, path: str | Path) -> Any:
    """A literal, or + - * / // of numbers."""
    ops = {
        ast.Add: "__add__",
        ast.Sub: "__sub__",
        ast.Mult: "__mul__",
        ast.Div: "__truediv__",
        ast.FloorDiv: "__floordiv__",
    }
    try:
        if isinstance(node, ast.BinOp) and type(node.op) in ops:
            left, right = _evaluate(node.left, path), _evaluate(node.right, path)
            if all(isinstance(v, (int, float)) for v in (left, right)):
                if isinstance(left, int) and isinstance(right, float):
                    left = float(left)
                return getattr(left, ops[type(node.op)])(right)
        return ast.literal_eval(node)
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as e:
        raise UserError(
            f"{path}, line {node.lineno}: the value must be a literal such as 6, 0.02, 'text' or True"
        ) from e


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _check_type(path: str, name: str, value: Any, want: Any) -> Any:
    """A config file's value must have the type of the field (an int will do for a float)."""
    kinds = typing.get_args(want) if isinstance(want, types.UnionType) else (want,)  # str | None
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int and abs(value) < 1e300:
        return float(value)
    takes = " or ".join(kind.__name__ for kind in kinds if kind is not types.NoneType)
    got = type(value).__name__
    raise UserError(f"{path}: {name} = {str(value)[:60]} is of type {got}, but {name} takes {takes}")


def parse(config_class: type, argv: Sequence[str] | None = None, description: str = "") -> Any:
    """Parse `argv` (default: the process's arguments) into a `config_class`. Raises UserError on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    names, hints = [f.name for f in dataclasses.fields(config_class)], typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    # --config first: what it sets becomes the defaults that --help shows
    rest = []
    it = iter(argv)
    for arg in it:
        if arg == "--config" or arg.startswith("--config="):
            path = arg.partition("=")[2] or next(it, "")
            if not path:
                raise UserError("--config needs a file, for example --config mine.py")
            for name, value in load_config_file(path).items():
                if name not in names:
                    raise UserError(f"{path}: unknown setting '{name}'{_nearest(name, names)}")
                values[name] = _check_type(path, name, value, hints[name])
        else:
            rest.append(arg)
    parser = _Parser(
        description=description.strip(),
        epilog="--config FILE.py loads plain assignments (name = value) as defaults; flags override it.",
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.FLAT,
        formatter_class=_formatter(),
        allow_abbrev=False,
    )
    if (config_class.__doc__ or "").startswith(f"{config_class.__name__}("):  # what dataclass makes up: a raw signature
        config_class.__doc__ = "Settings; each can be given as a flag."
    parser.add_arguments(config_class, dest="config", default=config_class(**values))
    parsed, unknown = parser.parse_known_args(rest)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        if not unknown[0].startswith("-"):
            raise UserError(f"unexpected argument '{unknown[0]}'; options look like --name value")
        raise UserError(f"unknown option {unknown[0]}{_nearest(f'--{name}', [f'--{n}' for n in names])}")
    if not 0 <= (seed := getattr(parsed.config, "seed", 0)) < 2**32:
        raise UserError(f"--seed {seed}: choose a number from 0 to {2**32 - 1}")
    return parsed.config


def _formatter() -> type:
    class Formatter(simple_parsing.help_formatter.SimpleHelpFormatter):
        def __init__(self, prog: str):
            super().__init__(prog, max_help_position=34, width=min(120, int(os.environ.get("COLUMNS", "120"))))

        def _expand_help(self, action) -> str:
            # "95 % of" in a comment is no format
            action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help or "")
            return super()._expand_help(action)

        def _format_action_invocation(self, action) -> str:
            """One spelling an option; simple-parsing would list --top_k, --top-k and --no… in random order."""
            if not action.option_strings:
                return super()._format_action_invocation(action)
            name = f"--{action.dest.rpartition('.')[2]}"
            shown = sorted(o for o in action.option_strings if not o.startswith("--")) if name != "--help" else ["-h"]
            kind = getattr(action.type, "__name__", "") if action.nargs != 0 else ""
            return ", ".join([*shown, name]) + (f" {action.metavar or kind}" if kind else "")

    return Formatter


def run(main: Callable[[Any], Any], config_class: type, argv: Sequence[str] | None = None) -> None:
    """The edge of every script: parse, run `main(config)`, end with one line and exit code 2 on a user's error."""
    description = sys.modules[main.__module__].__doc__ or ""
    try:
        main(parse(config_class, argv, description))
    except UserError as e:
        _fail(str(e))
    except OSError as e:  # disk full, permission denied: the user's to mend, too
        _fail(f"{e.strerror or e}" + (f" ({e.filename})" if e.filename else ""))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        cleanup_distributed()


def _fail(message: str) -> typing.NoReturn:
    """One line and exit code 2. Every rank speaks: only one of them may have had the accident."""
    rank = f"[rank {os.environ.get('RANK', 0)}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(2)
