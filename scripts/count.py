"""Count how dense the package's Python is: `python scripts/count.py [PATH ...] [--list]`.

A count is a hint where to read, not a goal: no line should get worse to make a figure better.
"""

import argparse
import ast
import io
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAPPING_NAMES = ("dict", "Mapping", "MutableMapping", "Dict")


@dataclass
class Counts:
    """What one file, or several together, contain."""

    lines: int = 0
    comprehensions: int = 0
    nested_comprehensions: int = 0
    conditional_expressions: int = 0
    comment_lines: int = 0
    untyped_mappings: int = 0
    long_files: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)
    wide_functions: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Add the counts of `other` to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def python_files(paths: list[Path]) -> Iterator[Path]:
    """Yield the Python files among `paths` and in the folders among them, each folder in order of its names."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        else:
            yield path


def count_comment_lines(source: str) -> int:
    """Return the number of lines that hold a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT and token.line.lstrip().startswith("#") for token in tokens)


def count_nested(tree: ast.AST) -> int:
    """Return the number of comprehensions that stand inside another one."""
    nested = set()
    for outer in ast.walk(tree):
        if isinstance(outer, COMPREHENSIONS):
            for inner in ast.walk(outer):
                if inner is not outer and isinstance(inner, COMPREHENSIONS):
                    nested.add(inner)
    return len(nested)


def is_untyped_mapping(node: ast.AST) -> bool:
    """Tell whether `node` is an annotation such as `dict[str, Any]`."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name | ast.Attribute):
        return False
    name = ast.unparse(node.value).split(".")[-1]
    return name in MAPPING_NAMES and ast.unparse(node.slice).strip("()") == "str, Any"


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> bool:
    """Tell whether `function` declares a command, whose options are its parameters."""
    in_cli = path.parent.name == "cli" or path.name == "cli.py"
    return in_cli and not function.name.startswith("_")


def add_functions(counts: Counts, tree: ast.AST, path: Path) -> None:
    """Add the functions of `tree` that are too long or take too many parameters to `counts`."""
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS):
            continue
        where = f"{path}:{node.lineno} {node.name}"
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            counts.long_functions.append(f"{where} ({lines} lines)")
        parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        parameter_names = [parameter.arg for parameter in parameters if parameter.arg not in ("self", "cls")]
        if len(parameter_names) > MAX_PARAMETERS and not is_command(node, path):
            counts.wide_functions.append(f"{where} ({len(parameter_names)} parameters)")


def count_file(path: Path) -> Counts:
    """Return the counts of one file."""
    source = path.read_text()
    tree = ast.parse(source)
    kinds = Counter(type(node) for node in ast.walk(tree))
    counts = Counts(
        lines=sum(bool(line.strip()) for line in source.splitlines()),
        comprehensions=sum(kinds[kind] for kind in COMPREHENSIONS),
        nested_comprehensions=count_nested(tree),
        conditional_expressions=kinds[ast.IfExp],
        comment_lines=count_comment_lines(source),
        untyped_mappings=sum(map(is_untyped_mapping, ast.walk(tree))),
    )
    total_lines = len(source.splitlines())
    if total_lines > MAX_FILE_LINES:
        counts.long_files.append(f"{path} ({total_lines} lines)")
    add_functions(counts, tree, path)
    return counts


def print_table(counts: Counts) -> None:
    """Print the counts as a table, with those of other projects beside them."""
    rates = [
        ("comprehensions", counts.comprehensions, "7-15"),
        ("one inside another", counts.nested_comprehensions, "0-1.4"),
        ("conditional expressions", counts.conditional_expressions, "5-11"),
        ("comment lines", counts.comment_lines, "40-141"),
    ]
    print(f"{counts.lines} non-blank lines\n")
    print(f"{'per 1,000 non-blank lines':<30}{'here':>8}{'elsewhere':>12}")
    for name, number, elsewhere in rates:
        print(f"{name:<30}{1000 * number / max(counts.lines, 1):>8.1f}{elsewhere:>12}")
    print(f"\n{'in all':<30}")
    print(f"{'dict[str, Any], Mapping[...]':<30}{counts.untyped_mappings:>8}")
    print(f"{f'files over {MAX_FILE_LINES} lines':<30}{len(counts.long_files):>8}")
    print(f"{f'functions over {MAX_FUNCTION_LINES} lines':<30}{len(counts.long_functions):>8}")
    print(f"{f'more than {MAX_PARAMETERS} parameters':<30}{len(counts.wide_functions):>8}")


def main() -> None:
    """Count the files of the command line, or of covray/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("covray")], metavar="PATH")
    parser.add_argument("--list", action="store_true", help="name the long files and the long and wide functions")
    parser.add_argument("--by-file", action="store_true", help="one line a file: lines, comprehensions, conditionals")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    missing = [str(path) for path in options.paths if not path.exists()]
    if missing:
        sys.exit(f"no such file or folder: {', '.join(missing)}")
    total = Counts()
    for path in python_files(options.paths):
        counts = count_file(path)
        total.add(counts)
        if options.by_file:
            print(
                f"{counts.lines:>6} lines {counts.comprehensions:>4} comprehensions "
                f"{counts.nested_comprehensions:>3} nested {counts.conditional_expressions:>4} conditionals "
                f"{counts.comment_lines:>4} comments {counts.untyped_mappings:>4} untyped  {path}"
            )
    if options.json:
        print(json.dumps(asdict(total), indent=1))
        return
    print_table(total)
    if options.list:
        for line in [*total.long_files, *total.long_functions, *total.wide_functions]:
            print(line)


if __name__ == "__main__":
    main()
