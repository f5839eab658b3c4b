"""AdamW, SGD and Muon, and how the learning rate goes up and down over a run."""

import math

import torch

# Muon's quintic: its slope at zero lifts small singular values fast, and five rounds leave all of
# them between about 0.7 and 1.2, which is near enough to 1. Source: Keller Jordan, "Muon" (2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(G, steps=5):
    """About U V^T of G = U S V^T, for a stack (..., rows, columns) of matrices, with no SVD.

    Source: Keller Jordan's Muon; nanochat/muon.py::zeropower_via_newtonschulz5.
    """
    a, b, c = QUINTIC
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G  # the smaller Gram matrix is the cheaper one
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # all singular values at most 1
    for _ in range(steps):
        # X <- a X + b (X X^T) X + c (X X^T)^2 X: acts on each singular value as a s + b s^3 + c s^5
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose step is made orthogonal; for matrices only.

    The weight decay is decoupled. Matrices of one shape are worked on as one stack.
    """

    def __init__(self, weights, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for weights in shapes.values():
                self.step_stack(weights, group["lr"], group["momentum"], group["weight_decay"])

    def step_stack(self, weights, lr, momentum, weight_decay):
        """One step of several matrices (rows, columns) of the same shape."""
        grads = []
        for weight in weights:
            state = self.state[weight]
            average = state.setdefault("momentum_buffer", torch.zeros_like(weight))
            # m <- mu m + (1 - mu) g, and Nesterov's look ahead: mu m + (1 - mu) g
            average.lerp_(weight.grad, 1 - momentum)
            grads.append(weight.grad.lerp(average, momentum))
        rows, columns = weights[0].shape
        # A tall matrix takes a longer step, so that each output changes about as much.
        scale = max(1.0, rows / columns) ** 0.5
        for weight, update in zip(weights, newton_schulz(torch.stack(grads))):
            weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * scale)


def make_optimizers(model, config):
    """A list of optimizers that together hold every parameter once. config: TrainConfig.

    Weight decay acts on matrices only, as in nanoGPT: shrinking a norm's gain makes no sense.
    Each group remembers its peak rate as "peak_lr", for set_lr.
    """
    matrices = [w for w in model.parameters() if w.ndim >= 2]
    vectors = [w for w in model.parameters() if w.ndim < 2]
    muon = [w for w in model.blocks.parameters() if w.ndim == 2] * (config.optimizer == "muon")
    rest = [w for w in matrices if not any(w is m for m in muon)]
    groups = [{"params": rest, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        optimizers = [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum,
                                      nesterov=config.momentum > 0)]
    else:
        optimizers = [torch.optim.AdamW(groups, lr=config.lr, fused=True,
                                        betas=(config.momentum, config.beta2))]
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, config.momentum, config.weight_decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step, config):
    """The share of its peak that the learning rate has at `step` of config.steps (from 0).

    It climbs in a line for warmup_steps, then: constant; cosine or linear down to min_lr_fraction;
    wsd: constant, and down in a line in the last decay_fraction of the steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    begin = config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        begin = config.steps - config.decay_fraction * config.steps
    done = min(1.0, max(0.0, (step - begin) / (config.steps - begin)))
    if config.schedule == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return 1 - done * (1 - config.min_lr_fraction)


def set_lr(optimizers, factor):
    """Give every group factor times its peak rate."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = factor * group["peak_lr"]
