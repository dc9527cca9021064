"""The dense Fisher of a model, from Jacobians alone, to hold the blocks to."""

import warnings

import torch
from torch.func import functional_call, jacrev


def dense_fisher(model, x, layers, block):
    """`Σ_i coeff_i/N_i Jᵀ F_i J` over the losses, in the order of the block's `V`.

    To be called before an estimator watches the model.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    own = {names[id(param)]: param.detach() for param in block.params}

    def outputs(params):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = functional_call(model, params | buffers, (x,))
        return [z for _, z in layers.network_outputs(output)]

    total = 0
    with torch.no_grad():
        losses = layers.losses(model(x))
    with warnings.catch_warnings():
        # Of a bag and a bilinear layer it goes one by one.
        warnings.filterwarnings("ignore", "There is a performance drop because")
        jacobians = jacrev(outputs)(own)
    for (loss, coeff), jacobian in zip(losses, jacobians, strict=True):
        z = loss.inputs
        parts = [jacobian[name].flatten(0, z.dim() - 1) for name in own]
        J = torch.stack(
            [
                block.params_to_vector([part[i] for part in parts]).flatten()
                for i in range(z.numel())
            ]
        )
        columns = [loss.multiply_fisher(column.view_as(z)).flatten() for column in J.T]
        total = total + coeff / loss.num_terms * J.T @ torch.stack(columns, dim=1)
    return total
