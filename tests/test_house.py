"""The house rules that no linter knows: sizes, dependencies, the public list."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_mutable_module_globals(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value = node.value
            mutable = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp
            assert not isinstance(value, mutable), f"{path}:{node.lineno}"
    assert "global " not in re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.DOTALL)


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
