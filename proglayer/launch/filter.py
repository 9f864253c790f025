"""Which combinations of a sweep are kept: `hydra.sweeper.filter`, an expression over each job.

    lr.base * phase.batch_size < 1 and (model == "standard" or added_layers in [1, 3])

It is Python's grammar, of which comparisons, arithmetic on numbers, `and`, `or`, `not`, `in` and
lists are read. Nothing is executed: names are looked up among the job's overrides, and there is no
way to call anything.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from proglayer.errors import ConfigError

SETTING = "hydra.sweeper.filter"
# As YAML and as Hydra's grammar write them.
WORDS = {"null": None, "true": True, "false": False}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
# No power: a few characters of it keep a processor busy for hours.
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Filter:
    """An expression over the overrides of a job.

    names: the settings that it asks for.

    Raises ConfigError for an expression that cannot be read.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self.names = frozenset(self._names(self._tree))
        except ConfigError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._error("this is no expression such as 'added_layers < 3'") from None

    def keeps(self, settings: Mapping[str, Any]) -> bool:
        """Whether the expression holds for a job; a setting that it does not give is null.

        Raises ConfigError where values of these types cannot be compared.
        """
        try:
            return bool(self._value(self._tree, settings))
        except (TypeError, ArithmeticError, RecursionError) as error:
            given = ", ".join(f"{name}={settings.get(name)}" for name in sorted(self.names))
            raise self._error(f"{error}  [{given}]") from None

    def _names(self, node: ast.AST) -> list[str]:
        """The settings below a node. Raises ConfigError for anything but the grammar above."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = ast.unparse(node)
            return [] if name in WORDS else [name]
        allowed = (
            isinstance(node, (ast.BoolOp, ast.Constant, ast.List, ast.Tuple))
            or (isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)))
            or (isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC)
            or (isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops))
        )
        if not allowed:
            raise self._error(
                f"{ast.unparse(node)} is not allowed in it: it takes comparisons, + - * / // %, "
                "and, or, not, in and lists"
            )
        parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return [name for part in parts for name in self._names(part)]

    def _value(self, node: ast.expr, settings: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value):
                return value
            case ast.List(elements) | ast.Tuple(elements):
                return [self._value(element, settings) for element in elements]
            case ast.BoolOp(op, operands):
                values = (self._value(operand, settings) for operand in operands)
                return all(values) if isinstance(op, ast.And) else any(values)
            case ast.UnaryOp(op, operand):
                value = self._value(operand, settings)
                return not value if isinstance(op, ast.Not) else -value
            case ast.BinOp(left, op, right):
                a, b = self._value(left, settings), self._value(right, settings)
                if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
                    raise TypeError(f"{ast.unparse(node)} is arithmetic, which takes numbers")
                return ARITHMETIC[type(op)](a, b)
            case ast.Compare(left, ops, comparators):
                operands = [self._value(each, settings) for each in (left, *comparators)]
                pairs = zip(ops, operands, operands[1:], strict=False)
                return all(COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        name = ast.unparse(node)
        return WORDS[name] if name in WORDS else settings.get(name)

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{SETTING}={self._text}: {problem}")
