"""Writes docs/errors.md from the sources: `python docs/write_errors.py`; a test compares.

An error of the service is made with a class of app/core/errors.py, a message, a code and a remedy. Those that
stand in the sources as text are read from their syntax trees; what is known only as the service runs is an
ellipsis.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from app.core import errors
from app.core.faults.error_answers import status_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
CODE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
NOT_ERRORS = {"Noted", "ModelHeaders", "JsonFile", "Status"}  # calls whose `code` is something else
RECORDS = {"Meaning": errors.ModelRefused}  # errors that stand in tables
ENDS = "a job's end"
# What parameters for them are called.
MESSAGES = ("message", "what", "said")
REMEDIES = ("remedy", "without_token")
INTRODUCTION = """# Error codes

Made from the sources by `docs/write_errors.py`. `code` is stable: programs decide by it. The message says
what is wrong and the remedy what to change; an ellipsis stands for what only the running service knows.
Management routes answer with the status below; inference routes with 400 where 422 stands. "A job's end" is
found in the job's `error`, not in an answer. 500 `internal` is a fault of the service: its log has the trace
under the answer's request id.
"""


class Refusal(NamedTuple):
    """One place of the sources that makes an error."""

    code: str
    kind: type[errors.NibbleError] | None  # None where the place names no class of the tree
    message: str
    remedy: str


def page() -> str:
    by_code: dict[str, list[Refusal]] = {}
    for refusal in sorted(refusals(), key=lambda each: each.code):
        by_code.setdefault(refusal.code, []).append(refusal)
    lines = [INTRODUCTION, "| code | status | what it says | what to change |", "|---|---|---|---|"]
    for code, places in by_code.items():
        kinds = {status(each.kind) for each in places if each.kind is not None}
        lines.append(
            f"| `{code}` | {', '.join(sorted(kinds))} | {texts(each.message for each in places)} "
            f"| {texts(each.remedy for each in places)} |"
        )
    return "\n".join(lines) + "\n"


def texts(all_texts: Iterator[str]) -> str:
    """Each text once, those for one code under each other."""
    return "<br>".join(dict.fromkeys(escaped(text) for text in all_texts if text.strip("… "))) or "…"


def escaped(text: str) -> str:
    return re.sub(r"([|<>\[\]*])", r"\\\1", " ".join(text.split()))


def status(kind: type[errors.NibbleError]) -> str:
    if issubclass(kind, errors.JobFault):
        return ENDS
    return str(status_of(kind("")))


def refusals() -> Iterator[Refusal]:
    """Every error of the tree by its own code, and every place that gives another."""
    meanings = dict(re.findall(r"[├└]── (\w+) +(.+)", errors.__doc__ or ""))
    for kind in descendants(errors.NibbleError):
        yield Refusal(kind.code, kind, meanings.get(kind.__name__, ""), "")
    packages = ("app", "workers", "kernels")
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    # The tree itself was read above, and the client repeats what the service says.
    skipped = (ROOT / "app" / "client", Path(errors.__file__))
    modules = [Module(file) for file in files if file not in skipped and file.parent not in skipped]
    for module in modules:
        yield from module.of_classes()
    takers = {
        (module.name, taker.name): taker for module in modules for taker in takers_of_codes(module.tree)
    }
    for module in modules:
        yield from module.of_calls(takers)


def descendants(kind: type[errors.NibbleError]) -> Iterator[type[errors.NibbleError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from descendants(child)


class Module:
    """The errors that one module makes."""

    def __init__(self, file: Path) -> None:
        self.name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        self.tree = tree = ast.parse(file.read_text("utf-8"))
        self.constants = {
            target.id: assigned.value
            for assigned in tree.body
            if isinstance(assigned, ast.Assign | ast.AnnAssign) and assigned.value is not None
            for target in (assigned.targets if isinstance(assigned, ast.Assign) else [assigned.target])
            if isinstance(target, ast.Name)
        }
        self.origins = {
            alias.asname or alias.name: (line.module or "", alias.name)
            for line in ast.walk(tree)
            if isinstance(line, ast.ImportFrom)
            for alias in line.names
        }

    def of_classes(self) -> Iterator[Refusal]:
        """Classes with a code of their own, each after those it stands below."""
        for node in (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)):
            kind = next((KINDS[name] for name in bases(node) if name in KINDS), None)
            if kind is None:
                continue
            KINDS[node.name] = kind
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "code":
                    summary = (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
                    yield Refusal(ast.literal_eval(line.value), kind, summary, "")

    def of_calls(self, takers: Mapping[tuple[str, str], Taker]) -> Iterator[Refusal]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rsplit(".", 1)[-1]
                usual = Taker(name, ["message"], KINDS.get(name))
                yield from self.of_call(node, takers.get(self.origins.get(name, (self.name, name)), usual))

    def of_call(self, node: ast.Call, taker: Taker) -> Iterator[Refusal]:
        values: dict[str | None, ast.expr] = dict(zip(taker.parameters, node.args, strict=False))
        values |= {word.arg: word.value for word in node.keywords}
        if taker.name not in NOT_ERRORS and "code" in values:
            message, remedy = (self.text(first(values, names)) for names in (MESSAGES, REMEDIES))
            for code in codes(values["code"]):
                yield Refusal(code, taker.kind, message, remedy)

    def text(self, node: ast.expr | None) -> str:
        """The text of an expression, with an ellipsis for what is computed."""
        match node:
            case None:
                return ""
            case ast.Constant(value=str() as value):
                return value
            case ast.JoinedStr(values=pieces):
                return "".join(self.text(piece) for piece in pieces)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.text(left) + self.text(right)
            case ast.IfExp(body=body, orelse=other):
                return f"{self.text(body)}, or: {self.text(other)}"
            case ast.Name(id=name) if name in self.constants:
                return self.text(self.constants[name])
        return "…"


class Taker(NamedTuple):
    """A function or record of a module that takes a code by position, and the error that it makes."""

    name: str
    parameters: list[str]
    kind: type[errors.NibbleError] | None


def takers_of_codes(tree: ast.Module) -> Iterator[Taker]:
    for node in ast.walk(tree):
        kind = None
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args if argument.arg != "self"]
            kind = KINDS.get(ast.unparse(node.returns)) if node.returns is not None else None
        elif isinstance(node, ast.ClassDef):
            kind = RECORDS.get(node.name)
            names = [ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)]
        else:
            continue
        if "code" in names:
            yield Taker(node.name, names, kind)


def codes(node: ast.expr) -> Iterator[str]:
    """The codes that an expression may be."""
    if isinstance(node, ast.IfExp):
        yield from codes(node.body)
        yield from codes(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
        yield node.value


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases]


def first(values: Mapping[str | None, ast.expr], names: tuple[str, ...]) -> ast.expr | None:
    return next((values[name] for name in names if name in values), None)


# Classes of the tree, and as modules are read those that stand below them elsewhere.
KINDS: dict[str, type[errors.NibbleError]] = {kind.__name__: kind for kind in descendants(errors.NibbleError)}


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
