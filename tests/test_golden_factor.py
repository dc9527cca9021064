"""The lineage's own outputs for `ConvInputKroneckerFactor`, 60 random cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kfac_torch.fisher_factors import ConvInputKroneckerFactor

GOLDEN = np.load(Path(__file__).parent / "golden" / "conv_input.npz")
CASES = json.loads(bytes(GOLDEN["meta_json"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_case(case):
    def array(key):
        return GOLDEN[f"{case['name']}/{key}"]

    def towers(update):
        return [array(f"input_u{update}_t{tower}") for tower in range(case["towers"])]

    factor = ConvInputKroneckerFactor(
        towers(0),
        case["filter_shape"],
        case["padding"],
        case["strides"],
        case["dilation_rate"],
        None,
        case["extract_patches_fn"],
        case["has_bias"],
    )
    factor.instantiate_cov_variables()
    for exp in case["exps"]:
        factor.register_matpower(exp, case["damping"])
    factor.instantiate_inv_variables()
    # The lineage kept its decay in float32, where 0.9 is not the float64 0.9.
    op = factor.make_covariance_update_op(float(np.float32(case["ema_decay"])))
    for update in range(case["updates"]):
        cov = op() if update == 0 else op(towers(update))
        assert_close(cov, array(f"cov_u{update}"))
    for op in factor.make_inverse_update_ops():
        op()
    for exp in case["exps"]:
        assert_close(factor.get_matpower(exp, case["damping"]), array(f"matpower_{exp}"))
    x = torch.from_numpy(array("x"))
    product = factor.left_multiply_matpower(x, -1, case["damping"])
    assert_close(product, array("left_multiply_inverse"))


def assert_close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-10 * scale)
