#!/usr/bin/env python3
"""GPT-2 in PyTorch, as its users write it: the yardstick of run.py.  One JSON line per variant on stdout.

torch.compile, fused AdamW, flash attention, fp32 master weights and bf16 compute, gradients clipped; vocabulary padded
to a multiple of 128 (a favour to PyTorch: it has no such padding of its own).  Variants: plain (autocast), ddp, fsdp
(FSDP2, fully_shard with bf16 parameters and fp32 reduction), lightning (its FSDPStrategy), at world size 1.
"""
import argparse
import json
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}


class Block(nn.Module):
    def __init__(self, heads, width):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, layers, heads, width, vocabulary=50304, context=1024):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(heads, width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def optimizer_of(model):
    # by name: FSDP's shards have one dimension, whatever they are of
    vector = [name.endswith("bias") or ".ln_" in f".{name}" for name, _ in model.named_parameters()]
    matrices = [p for p, v in zip(model.parameters(), vector) if not v]
    vectors = [p for p, v in zip(model.parameters(), vector) if v]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                             lr=3e-4, betas=(0.9, 0.95), fused=True)


def wrap(variant, model):
    """-> (module to call, autocast wanted)"""
    if variant == "plain":
        return torch.compile(model), True
    import torch.distributed as dist
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29531")
        dist.init_process_group("nccl", rank=0, world_size=1)
    if variant == "ddp":
        return torch.compile(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)), True
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for i, block in enumerate(model.blocks):
        model.blocks[i].compile()
    return model, False


def measure(variant, size, micro, sequence, steps):
    model = GPT2(*SIZES[size], context=sequence).cuda()
    call, autocast = wrap(variant, model)
    optimizer = optimizer_of(model)
    tokens = torch.randint(0, 50257, (steps, micro, sequence + 1), device="cuda")
    seconds, loss = [], None
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = call(tokens[step, :, :-1], tokens[step, :, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[steps // 3:]), float(loss)


def measure_lightning(size, micro, sequence, steps):
    import lightning
    from lightning.pytorch.strategies import FSDPStrategy

    seconds = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = torch.compile(GPT2(*SIZES[size], context=sequence))

        def training_step(self, batch, _):
            return self.net(batch[0][:, :-1], batch[0][:, 1:])

        def configure_optimizers(self):
            return optimizer_of(self)

        def configure_gradient_clipping(self, optimizer, **_):
            self.trainer.strategy.model.clip_grad_norm_(1.0)  # FSDP's own: shards of gradients have no norm alone

        def on_train_batch_start(self, *_):
            torch.cuda.synchronize()
            self.begin = time.perf_counter()

        def on_train_batch_end(self, *_):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.begin)

    data = torch.utils.data.TensorDataset(torch.randint(0, 50257, (steps * micro, sequence + 1)))
    trainer = lightning.Trainer(accelerator="gpu", devices=1, max_steps=steps, precision="bf16-mixed", logger=False,
                                strategy=FSDPStrategy(auto_wrap_policy={Block}, use_orig_params=True),
                                enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=micro))
    return statistics.median(seconds[steps // 3:]), math.nan


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=["plain", "ddp", "fsdp", "lightning"])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    a = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1337)
    how = measure_lightning if a.variant == "lightning" else lambda *rest: measure(a.variant, *rest)
    seconds, loss = how(a.size, a.micro, a.sequence, a.steps)
    print(json.dumps({"variant": a.variant, "seconds": seconds, "loss": loss, "version": torch.__version__,
                      "peak": torch.cuda.max_memory_allocated()}), file=sys.stdout)


if __name__ == "__main__":
    main()
