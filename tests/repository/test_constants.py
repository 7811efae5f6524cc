"""What two modules called alike must not become one name when they are put together."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dspark_megatron"


def test_no_module_gives_a_constant_two_values():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = [target for node in tree.body for target in getattr(node, "targets", [])]
        names = Counter(target.id for target in targets if isinstance(target, ast.Name))
        twice = [name for name, count in names.items() if count > 1]
        assert not twice, f"{path.relative_to(PACKAGE)} defines {twice} twice"
