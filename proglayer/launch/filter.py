"""Which combinations of a sweep are kept: `hydra.sweeper.filter`, an expression over each job.

    lr.base * phase.batch_size < 1 and (model == "standard" or added_layers in [1, 3])

It is Python's grammar, of which comparisons, arithmetic, `and`, `or`, `not`, `in` and lists are
taken. Names are looked up among the job's overrides, and there is no way to call anything.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from proglayer.errors import ConfigError

# No power: a few characters of it keep a processor busy for hours.
ALLOWED = (
    *(ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load),
)
# As YAML and as Hydra's grammar write them.
WORDS = {"null": None, "true": True, "false": False}


class _Dotted(ast.NodeTransformer):
    """Makes one name of `lr.base`."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.Name:
        return ast.Name(ast.unparse(node), ast.Load())


def is_kept(expression: str, jobs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether the expression holds for each job, given by its settings.

    A setting that another job gives and this one does not is null.

    Raises ConfigError for an expression that cannot be read, names what no job gives, compares what
    cannot be compared, or holds for none.
    """

    def problem(what: str) -> ConfigError:
        return ConfigError(f"hydra.sweeper.filter={expression}: {what}")

    try:
        tree = _Dotted().visit(ast.parse(expression.strip(), mode="eval"))
        for node in ast.walk(tree):
            if not isinstance(node, ALLOWED):
                raise problem(
                    "it takes comparisons, + - * / // %, and, or, not, in and lists alone"
                )
        code = compile(ast.fix_missing_locations(tree), "<filter>", "eval")
    except ConfigError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise problem("this is no expression such as 'added_layers < 3'") from None
    known = {name for job in jobs for name in job}
    for name in sorted({*code.co_names} - WORDS.keys() - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise problem(f"names {name}, which has no value here{hint} (text is written in quotes)")
    kept = []
    for job in jobs:
        given = {name: job.get(name) for name in code.co_names if name in known}
        try:
            kept.append(bool(eval(code, {"__builtins__": {}, **WORDS}, given)))
        except (TypeError, ArithmeticError) as error:
            values = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
            raise problem(f"{error}  [{values}]") from None
    if not any(kept):
        raise problem(f"keeps none of {len(jobs)} jobs")
    return kept
