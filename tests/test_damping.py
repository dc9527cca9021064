import pytest
import torch

from kfac_torch.damping import (
    PackagedFunc,
    check_damping,
    compute_pi_adjusted_damping,
    compute_pi_tracenorm,
    damping_id,
    evaluate_damping,
    normalize_damping,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues():
    A, G = torch.diag(torch.tensor([1.0, 2.0, 0.0, 1.0])), torch.ones(2, 2)
    assert compute_pi_tracenorm(A, G).item() == 1.0
    assert compute_pi_tracenorm(4 * A, G).item() == 2.0
    assert compute_pi_tracenorm(4 * A.diagonal(), G).item() == 2.0


@pytest.mark.parametrize(("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_is_one_where_a_trace_is_zero(a, g):
    assert compute_pi_tracenorm(a * torch.eye(2), g * torch.eye(3)).item() == 1.0


def test_pi_of_something_else():
    with pytest.raises(ValueError, match=r"matrix.*got shape \(1, 2, 3\)"):
        compute_pi_tracenorm(torch.zeros(1, 2, 3), torch.eye(2))


def test_split_has_the_damping_as_its_product():
    left, right = compute_pi_adjusted_damping(4 * torch.eye(2), torch.eye(3), 0.09)
    assert left.item() == pytest.approx(0.6)
    assert (left * right).item() == pytest.approx(0.09)


def test_normalize_damping():
    assert normalize_damping(0.5, 4) == 0.125


def test_identity_of_damping_functions():
    def f():
        return 0.1

    assert damping_id(f) == damping_id(f)
    assert damping_id(f) != damping_id(lambda: 0.1)
    assert damping_id(1) == damping_id(1.0)
    assert damping_id(PackagedFunc(f, "a")) == damping_id(PackagedFunc(lambda: 9, ("a",)))
    assert damping_id(PackagedFunc(f, "a")) != damping_id(PackagedFunc(f, "b"))


def test_callables_in_an_identity_are_called_when_it_is_read():
    layer = ["one"]
    func = PackagedFunc(lambda: 0.1, (lambda: layer[0], 2))
    assert func.func_id == ("one", 2)
    layer[0] = "two"
    assert func.func_id == ("two", 2)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_damping_that_is_no_damping(value):
    with pytest.raises(ValueError, match=r"damping: expected a finite number >= 0, got"):
        check_damping(value)
    with pytest.raises(ValueError, match="damping of fc"):
        evaluate_damping(lambda: torch.tensor(value), "fc")


def test_damping_of_another_type():
    with pytest.raises(TypeError, match="expected a non-negative number or a callable"):
        damping_id("large")
