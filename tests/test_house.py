"""The house rules that no linter knows: sizes, dependencies, the public list."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import kfac_torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_KEYWORDS, MAX_NAMES = 600, 60, 12, 25


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for function in functions(ast.parse(text)):
        doc = ast.get_docstring(function, clean=False)
        lines = function.end_lineno - function.lineno + 1
        lines -= doc.count("\n") + 1 if doc else 0
        assert lines <= MAX_FUNCTION, f"{path}:{function.lineno} {function.name}"
        if function.name == "__init__":
            assert len(function.args.kwonlyargs) <= MAX_KEYWORDS


def is_constant(value):
    """Whether nothing in a value can be changed: no switch can hide in it."""
    if isinstance(value, Mapping):
        return isinstance(value, MappingProxyType) and all(map(is_constant, value.values()))
    if isinstance(value, tuple | frozenset):
        return all(map(is_constant, value))
    if isinstance(value, functools.partial):
        return is_constant(value.args) and all(map(is_constant, value.keywords.values()))
    plain = bool | int | float | complex | str | bytes | torch.dtype | None
    code = type | types.FunctionType | types.BuiltinFunctionType | functools.cached_property
    of_types = types.GenericAlias | types.UnionType | typing.TypeVar | typing.ForwardRef
    # `Callable[...]`, `Any` and their like are instances of private classes.
    of_typing = type(value).__module__ in ("typing", "collections.abc")
    return of_typing or isinstance(value, plain | code | of_types)


def assigned(body):
    """The names that the statements of a module or a class assign, whatever is around."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from (n.id for t in node.targets for n in ast.walk(t) if named(n))
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            if node.value is not None and named(node.target):
                yield node.target.id
        elif isinstance(node, ast.For):
            yield from (n.id for n in ast.walk(node.target) if named(n))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from assigned(getattr(node, part, []))


def named(node):
    return isinstance(node, ast.Name)


def changed(tree):
    """What functions change of the module, or of another: `global x`, `module.x = ...`."""
    modules = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if named(root) and root.id in modules | classes | {"cls"}:
                yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_global_switches(path):
    """What a module or a class body assigns is constant, through and through."""
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    tree = ast.parse(path.read_text())
    for attribute in assigned(tree.body):
        assert is_constant(getattr(module, attribute)), f"{path}: {attribute}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = vars(getattr(module, node.name))
            for attribute in set(assigned(node.body)) & set(own):
                value = own[attribute]
                descriptor = hasattr(type(value), "__get__")  # has its state in the object
                assert descriptor or is_constant(value), f"{path}: {node.name}.{attribute}"
    assert not list(changed(tree)), f"{path}: {list(changed(tree))}"


@pytest.mark.parametrize(
    "switch",
    [
        "x = []",
        "x = dict(a=1)",
        "x = ({},)",
        "x = types.MappingProxyType({'a': []})",
        "x = functools.partial(print, end=[])",
        "x = torch.zeros(1)",
        "x = Switch()",
        "if True:\n    x = set()",
        "for x in [[]]:\n    pass",
    ],
)
def test_a_global_switch_is_seen(switch):
    namespace = {"types": types, "functools": functools, "torch": torch}
    exec(f"class Switch: on = False\n{switch}", namespace)
    assert list(assigned(ast.parse(switch).body)) == ["x"]
    assert not is_constant(namespace["x"])


@pytest.mark.parametrize(
    "change",
    [
        "def f():\n    global x\n    x = 1",
        "import torch\ndef f():\n    torch.backends.cudnn.benchmark = True",
        "from . import base\ndef f():\n    base.x = 1",
        "class A:\n    on = False\ndef f():\n    A.on = True",
        "class A:\n    @classmethod\n    def f(cls):\n        cls.on = True",
    ],
)
def test_a_change_of_a_module_or_a_class_is_seen(change):
    assert len(list(changed(ast.parse(change)))) == 1


def test_importing_the_package_loads_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import kfac_torch; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = set(out.stdout.split()) - set(sys.stdlib_module_names)
    assert loaded <= {"kfac_torch", "torch"}


def test_the_public_list():
    names = kfac_torch.__all__
    assert len(names) <= MAX_NAMES
    documented = "KFAC LayerCollection FisherEstimator LevenbergMarquardt"
    modules = "fisher_blocks fisher_factors loss_functions curvature_products patch_moments"
    assert {*documented.split(), *modules.split()} <= {*names}
    for name in names:
        assert inspect.getdoc(getattr(kfac_torch, name)), f"{name} has no docstring"


def test_the_documented_signature_of_the_factor_at_the_heart():
    factor = kfac_torch.fisher_factors.ConvInputKroneckerFactor
    positional = [
        p.name
        for p in inspect.signature(factor).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    documented = "inputs filter_shape padding strides dilation_rate data_format"
    assert positional == [*documented.split(), "extract_patches_fn", "has_bias"]
    for method in (
        "get_cov get_cov_var get_eigendecomp get_inverse get_matpower "
        "instantiate_cov_variables instantiate_inv_variables left_multiply_matpower "
        "make_covariance_update_op make_inverse_update_ops register_inverse "
        "register_matpower right_multiply_matpower"
    ).split():
        assert inspect.getdoc(getattr(factor, method)), method
    assert issubclass(factor, kfac_torch.fisher_factors.InverseProvidingFactor)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_the_pages_point_at_exists(page):
    """Links and `path`s within the repository, and tests named as `file::test`."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        source = (ROOT / path).read_text()
        assert not test or f"def {test}(" in source, f"{path}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_code_on_the_pages_runs(page):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(block, namespace)
