"""What others do not promise to keep is used in one file."""

import ast
from pathlib import Path

import torch

import peft_s2a


PACKAGE = Path(peft_s2a.__file__).parent
OTHERS = ("torch", "peft", "transformers", "accelerate")


def _private_names(tree: ast.AST) -> list[str]:
    """Dotted names of others, imported or reached through a module, with a part that starts with an underscore."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found += [name for name in names if name.split(".")[0] in OTHERS and _is_private(name)]
    return found


def _is_private(name: str) -> bool:
    _, *rest = name.split("(")[0].split(".")
    if rest and (rest[0] == "ops" or hasattr(torch.ops.aten, rest[0])):
        return False  # operators of the dispatcher: saved programs hold their names
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_private_names_of_others_are_in_compat_only():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path.name != "compat.py" and (names := _private_names(ast.parse(path.read_text())))
    }
    assert found == {}


def test_the_check_sees_private_names():
    source = "from torch._C import x\nimport peft._y\nfrom torch.utils import _pytree\ntorch.overrides._len()\ntorch.ops.aten._z\n"
    assert len(_private_names(ast.parse(source))) == 4
