"""What an adapter may contain, checked on its syntax tree: renames, reshapes and configuration only."""

import ast

import torch
from torch.nn import functional

IMPORTS = ("foveate", "tests.parity", "torch", "math", "collections.abc", "functools", "typing", "__future__")
TORCH_NAMES = {"Tensor", "cat", "stack", "float32", "float64", "bool", "long", "nn", "Generator"}
# Methods of tensors that move entries about without computing anything.
MOVES = {
    *("reshape", "view", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("movedim", "moveaxis", "swapaxes", "expand", "contiguous", "clone", "detach", "split", "chunk"),
    *("unbind", "size", "dim", "numel", "to", "float", "double", "long", "bool", "t", "cpu", "view_as"),
    *("reshape_as", "expand_as", "narrow", "select", "item", "tolist", "requires_grad_", "copy_"),
}
COMPUTES = {name for name in {*dir(torch.Tensor), *dir(functional)} if not name.startswith("__")} - MOVES
# Functions of configuration that give configuration.
HARMLESS = {"int", "float", "round", "abs", "max", "min", "tuple", "list", "sum", "Grid"}
# Names shared by tensors and by dictionaries, strings, modules or vectors.
COMPUTES -= {"get", "items", "keys", "values", "index", "count", "split", "names", "type", "train", "name"}


def violations(source: str) -> list[str]:
    """Return a sentence for everything in an adapter's source that computes something."""
    tree = ast.parse(source)
    found = []
    integers = _integer_names(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if not any(name == ok or name.startswith(ok + ".") for ok in IMPORTS):
                    found.append(f"line {line}: imports {name}")
                if name.startswith("torch.") and not isinstance(node, ast.Import):
                    found.append(f"line {line}: imports from {name}")
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [
                    f"line {line}: imports torch.{a.name}" for a in node.names if a.name not in TORCH_NAMES
                ]
        elif isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
            if not _is_text(node) and not _is_integer(node, integers):
                found.append(f"line {line}: arithmetic on something that is not configuration")
        elif isinstance(node, ast.AugAssign | ast.MatMult):
            found.append(f"line {line}: arithmetic in place")
        elif (
            isinstance(node, ast.UnaryOp)
            and not isinstance(node.op, ast.Not)
            and not _is_integer(node.operand, integers)
        ):
            found.append(f"line {line}: a sign on something that is not configuration")
        elif isinstance(node, ast.Attribute) and _is_module(node.value, ("torch",)):
            found += [f"line {line}: torch.{node.attr}"] if node.attr not in TORCH_NAMES else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            ours = _is_module(node.func.value, ("math", "torch", "vector")) or (
                # `module.where(grid)` gives a pattern; a tensor's `where` needs two arguments.
                node.func.attr == "where" and len(node.args) == 1
            )
            if node.func.attr in COMPUTES and not ours:
                found.append(f"line {line}: .{node.func.attr}(...) computes")
    return found


def _is_module(node: ast.AST, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _is_integer(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is built from constants, configuration, shapes and lengths alone."""
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.Name(id=name):
            return name in names
        case ast.Starred(value=value):
            return _is_integer(value, names) or _is_config(value, names)
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return all(_is_integer(e, names) for e in elements)
        case ast.BinOp(left=left, right=right):
            return _is_integer(left, names) and _is_integer(right, names)
        case ast.BoolOp(values=values):
            return all(_is_integer(v, names) for v in values)
        case ast.UnaryOp(operand=operand):
            return _is_integer(operand, names)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_integer(body, names) and _is_integer(orelse, names)
        case ast.Subscript(value=value):
            return _is_config(value, names)
        case ast.Call(func=ast.Attribute(attr="size" | "numel" | "dim")):
            return True
        case ast.Call(func=ast.Attribute(value=value, attr="get")):
            return _is_config(value, names)
        case ast.Call(func=ast.Name(id="len")):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math")), args=args):
            return all(_is_integer(a, names) for a in args)
        case ast.Call(func=ast.Name(id=name), args=args) if name in HARMLESS:
            return all(_is_integer(a, names) or _is_config(a, names) for a in args)
        case ast.Attribute(attr="ndim"):
            return True
    return False


def _is_config(node: ast.AST, names: set[str]) -> bool:
    match node:
        case ast.Name(id="config"):
            return True
        case ast.Name(id=name):
            return name in names
        case ast.Attribute(attr="config" | "shape"):
            return True
        case ast.Subscript(value=value):
            return _is_config(value, names)
    return False


def _integer_names(tree: ast.AST) -> set[str]:
    """Names that are only ever bound to configuration, shapes or lengths."""
    good: set[str] = set()
    bad: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                elements = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
                ok = _is_integer(node.value, good) or _is_config(node.value, good)
                for element in elements:
                    element = element.value if isinstance(element, ast.Starred) else element
                    if isinstance(element, ast.Name):
                        (good if ok else bad).add(element.id)
    return good - bad
