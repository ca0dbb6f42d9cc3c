#!/usr/bin/env python3
"""Writes golden_gpt.h: loss, gradients and three AdamW steps of one small GPT-2, computed by PyTorch in float64.

    pip install torch && python3 tests/golden/make_golden.py > tests/golden/golden_gpt.h

Weights and tokens come from the integer formulas of tests/support/gpt_rig.c, so that no file of numbers is needed.
torch computes the gradients and the AdamW updates; nothing of Phalanx is used.
"""
import math
import sys
import torch
import torch.nn.functional as F

LAYERS, HEADS, WIDTH, CONTEXT, VOCAB, BATCH, LENGTH = 2, 3, 12, 11, 37, 2, 9
LR, BETAS, EPS, DECAY, STEPS = 1e-2, (0.9, 0.95), 1e-8, 0.1, 3


def fraction(seed, i):
    x = (seed * 7919 + i * 104729 + 12345) % 2147483647
    x = x * 16807 % 2147483647
    x = x * 48271 % 2147483647
    return (x % 65536) / 32768 - 1


def value(param, i, name):
    f = fraction(param + 1, i)
    if "ln_" in name and name.endswith(".weight"):
        return 1 + 0.25 * f
    if name.endswith(".bias"):
        return 0.25 * f
    return (0.5 if name.startswith(("wte", "wpe")) else 0.375) * f


def token(i):
    return (i * 7919 + i * i % 101 * 31 + 5) % VOCAB


def shapes():
    c = WIDTH
    yield "wte.weight", (VOCAB, c)
    yield "wpe.weight", (CONTEXT, c)
    for layer in range(LAYERS):
        for name, shape in (("ln_1.weight", (c,)), ("ln_1.bias", (c,)),
                            ("attn.c_attn.weight", (3 * c, c)), ("attn.c_attn.bias", (3 * c,)),
                            ("attn.c_proj.weight", (c, c)), ("attn.c_proj.bias", (c,)),
                            ("ln_2.weight", (c,)), ("ln_2.bias", (c,)),
                            ("mlp.c_fc.weight", (4 * c, c)), ("mlp.c_fc.bias", (4 * c,)),
                            ("mlp.c_proj.weight", (c, 4 * c)), ("mlp.c_proj.bias", (c,))):
            yield f"h.{layer}.{name}", shape
    yield "ln_f.weight", (c,)
    yield "ln_f.bias", (c,)


def loss_of(p, tokens, targets):
    x = p["wte.weight"][tokens] + p["wpe.weight"][:LENGTH]
    for layer in range(LAYERS):
        w = lambda name: p[f"h.{layer}.{name}"]
        linear = lambda y, name: F.linear(y, w(name + ".weight"), w(name + ".bias"))
        norm = lambda y, name: F.layer_norm(y, (WIDTH,), w(name + ".weight"), w(name + ".bias"), 1e-5)
        q, k, v = (t.view(BATCH, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2)
                   for t in linear(norm(x, "ln_1"), "attn.c_attn").split(WIDTH, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH), "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate="tanh"), "mlp.c_proj")
    x = F.layer_norm(x, (WIDTH,), p["ln_f.weight"], p["ln_f.bias"], 1e-5)
    return F.cross_entropy((x @ p["wte.weight"].T).view(-1, VOCAB), targets.view(-1))


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    params = {}
    for index, (name, shape) in enumerate(shapes()):
        flat = [value(index, i, name) for i in range(math.prod(shape))]
        params[name] = torch.tensor(flat).view(shape).requires_grad_()
    n = BATCH * LENGTH
    tokens = torch.tensor([token(i) for i in range(n)]).view(BATCH, LENGTH)
    targets = torch.tensor([token(i + 1) for i in range(n)]).view(BATCH, LENGTH)
    out = sys.stdout.write
    out("/* tests/golden/golden_gpt.h - written by make_golden.py with PyTorch " + torch.__version__ +
        ", float64, one thread.\n * Do not edit: run the script again. */\n#ifndef PHX__GOLDEN_GPT_H\n"
        "#define PHX__GOLDEN_GPT_H\n\n")
    out(f"enum {{ GOLDEN_LAYERS = {LAYERS}, GOLDEN_HEADS = {HEADS}, GOLDEN_WIDTH = {WIDTH}, "
        f"GOLDEN_CONTEXT = {CONTEXT},\n       GOLDEN_VOCAB = {VOCAB}, GOLDEN_BATCH = {BATCH}, "
        f"GOLDEN_LENGTH = {LENGTH}, GOLDEN_STEPS = {STEPS} }};\n")
    out(f"static const double golden_lr = {LR}, golden_beta1 = {BETAS[0]}, golden_beta2 = {BETAS[1]};\n"
        f"static const double golden_eps = {EPS}, golden_decay = {DECAY}; /* decay on tensors of two dimensions */\n\n")
    losses = []
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in params.values() if p.dim() == 2], "weight_decay": DECAY},
         {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0}], lr=LR, betas=BETAS, eps=EPS)
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(params, tokens, targets)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            out("static const struct {\n  const char *name;\n  double norm; /* of the first step's gradient */\n"
                "  double first, middle, last; /* its elements 0, n / 2, n - 1 */\n} golden_gradients[] = {\n")
            for name, p in params.items():
                g = p.grad.flatten()
                out(f'    {{"{name}", {g.norm().item():.17g},\n     {g[0].item():.17g}, '
                    f"{g[g.numel() // 2].item():.17g}, {g[-1].item():.17g}}},\n")
            out("};\n\n")
        optimizer.step()
    out("/* Before each AdamW step, and after the last. */\n"
        "static const double golden_losses[GOLDEN_STEPS + 1] = {\n    " +
        ",\n    ".join(f"{x:.17g}" for x in losses) + "};\n#endif\n")


main()
