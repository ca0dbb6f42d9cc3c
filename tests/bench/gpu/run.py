#!/usr/bin/env python3
"""GPT-2 on one GPU, in bf16: every strategy at world size 1, beside PyTorch in the same run.

  tests/bench/gpu/run.py [--root BUILD] [--out DIR] [--sizes 124M:32,1558M:8] [--steps 30] [--rounds 3] [--no-torch]

Rounds interleave the programs; a ratio is formed within a round, and the median of the rounds is printed.  A run's
time is the median of its step times, the first third left out.

MFU is flops_per_token x tokens/s over a rate, flops_per_token = 6 (12 L C^2 + V C) + 12 L C T (a product's multiply
and add counted as two, forward and twice that backward, all of attention's T x T): once over 989 TFLOP/s, the dense bf16
rate of an H100 or H200 by its data sheet, once over the rate of a large bf16 product measured in this run.

Exit status 1 when a limit was missed, 77 where there is no GPU.
"""
import argparse
import array
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SHEET = 989e12
SHAPES = {"124M": (12, 768), "355M": (24, 1024), "774M": (36, 1280), "1558M": (48, 1600)}
VOCABULARY, SEQUENCE = 50257, 1024
STRATEGIES = {"bare": "bare", "ddp": "ddp", "fsdp full": "fsdp", "fsdp grad_op": "fsdp sharding=grad_op",
              "zero 1": "zero stage=1", "zero 2": "zero stage=2", "zero 3": "zero stage=3"}
LEAST_MFU = {"124M": 0.45, "1558M": 0.55}
missed = False


def flops_per_token(size):
    layers, width = SHAPES[size]
    return 6 * (12 * layers * width ** 2 + VOCABULARY * width) + 12 * layers * width * SEQUENCE


def say(what, value, asked="", met=True):
    global missed
    missed = missed or not met
    print(f"| {what} | {value} | {asked} | {'' if not asked else 'met' if met else 'NOT MET'} |", flush=True)


class Bench:
    def __init__(self, args, work):
        self.args, self.work, self.number = args, work, 0
        self.tokens = os.path.join(work, "tokens.bin")
        generator = random.Random(1337)
        with open(self.tokens, "wb") as f:
            array.array("H", (generator.randrange(VOCABULARY) for _ in range(4 << 20))).tofile(f)

    def phalanx(self, size, micro, strategy, sets=()):
        self.number += 1
        out = os.path.join(self.work, f"run{self.number}")
        ini = out + ".ini"
        with open(ini, "w", encoding="utf-8") as f:
            f.write(f"[run]\nsteps = {self.args.steps}\nout = {out}\nlog_every = 1000\n[batch]\nmicro = {micro}\n"
                    f"sequence = {SEQUENCE}\n[model]\nplugin = gpt\nsize = {size}\n[data]\ntrain = {self.tokens}\n"
                    f"[optimizer]\nlr = 3e-4\n[precision]\ncompute = bf16\n[device]\nplugin = cuda\n"
                    f"[plugins]\npath = {self.args.root}/lib/phalanx-test\n")
        name, *options = STRATEGIES[strategy].split()
        command = [f"{self.args.root}/bin/phalanx", "train", ini, "-n", "1", "--strategy", name]
        for s in [f"{name}.{o}" for o in options] + list(sets):
            command += ["--set", s]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            sys.exit(f"status {done.returncode} of {' '.join(command)}\n{done.stdout}{done.stderr}")
        with open(os.path.join(out, "run.json"), encoding="utf-8") as f:
            run = json.load(f)
        with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
            steps = [s for s in map(json.loads, f) if "loss" in s]
        shutil.rmtree(out)
        run["said"] = done.stdout + done.stderr
        run["seconds"] = statistics.median(s["step_ms"] for s in steps[len(steps) // 3:]) / 1e3
        run["steps"] = steps
        return run

    def torch(self, variant, size, micro):
        command = [sys.executable, os.path.join(HERE, "torch_gpt2.py"), variant, size, "--micro", str(micro),
                   "--sequence", str(SEQUENCE), "--steps", str(self.args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            return None, (done.stderr.strip().splitlines() or ["no message"])[-1][:100]
        return json.loads(done.stdout.strip().splitlines()[-1]), None


def rates(args):
    """What the device does in plain operations: {'product': FLOP/s, 'copy': B/s, 'adamw': B/s, ...}"""
    program = os.path.join(args.root, args.programs, "bench_gpu_ops")
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        print(done.stderr.strip())
        sys.exit(77)
    if done.returncode != 0:
        sys.exit(f"bench_gpu_ops: status {done.returncode}\n{done.stderr}")
    print(done.stdout, end="")
    return {name: float(value) for name, value in
            (line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("rate "))}


def kinds_of_kernels(run):
    """Milliseconds of a step by kind of operation, of a run with [cuda] profile = yes."""
    found = re.findall(r"profile: (\w+): ([0-9.]+) ms", run["said"])
    return {name: float(ms) / len(run["steps"]) for name, ms in found}


def one_size(bench, size, micro, rate):
    args, tokens = bench.args, micro * SEQUENCE
    variants = [] if args.no_torch else ["plain", "ddp", "fsdp"]
    if variants and importlib.util.find_spec("torch") is None:
        variants, _ = [], say(f"{size} PyTorch", "skipped: torch is not installed here")
    elif variants and importlib.util.find_spec("lightning") is not None:
        variants.append("lightning")
    ours, theirs = {s: [] for s in STRATEGIES}, {v: [] for v in variants}
    for i in range(args.rounds):
        for strategy in list(ours)[i % len(ours):] + list(ours)[:i % len(ours)]:
            ours[strategy].append(bench.phalanx(size, micro, strategy))
        for variant in list(theirs):
            result, why = bench.torch(variant, size, micro)
            if result is None:
                say(f"{size} PyTorch {variant}", f"failed: {why}")
                del theirs[variant]
            else:
                theirs[variant].append(result)
    for strategy, runs in ours.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        per_s = tokens / seconds
        flops = flops_per_token(size) * per_s
        least = LEAST_MFU.get(size) if strategy == "ddp" else None
        peak = sum(sum(k["measured"]) for k in runs[0]["result"]["bytes"].values())
        say(f"{size} {strategy}: ms, tokens/s, GiB held", f"{seconds * 1e3:.1f}, {per_s:.0f}, {peak / 2 ** 30:.1f}")
        say(f"{size} {strategy}: MFU of 989, of the product measured",
            f"{flops / SHEET:.3f}, {flops / rate['product']:.3f}",
            f"at least {least}" if least else "", least is None or flops / SHEET >= least)
        if strategy != "bare":
            ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, ours["bare"]))
            say(f"{size} {strategy} over bare, step time", f"{ratio:.3f}", "at most 1.02", ratio <= 1.02)
    for variant, results in theirs.items():
        ratio = statistics.median(t["seconds"] / o["seconds"] for t, o in zip(results, ours["ddp"]))
        asked = "at least 1.10" if variant == "plain" else ""
        say(f"{size} PyTorch {results[0]['version']} {variant}: ms, GiB; its step over ddp's",
            f"{statistics.median(t['seconds'] for t in results) * 1e3:.1f}, {results[0]['peak'] / 2 ** 30:.1f}; "
            f"{ratio:.3f}",
            asked, not asked or ratio >= 1.10)
    profile = kinds_of_kernels(bench.phalanx(size, micro, "ddp", ["cuda.profile=yes"]))
    total = sum(profile.values())
    for name, ms in sorted(profile.items(), key=lambda x: -x[1]):
        say(f"{size} ms of a step in {name}", f"{ms:.2f} ({100 * ms / total:.0f} %)")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=os.path.join(HERE, "../../../build"))
    parser.add_argument("--out", help="where results.txt goes, too")
    parser.add_argument("--sizes", default="124M:32,1558M:8", help="size:micro-batch, ...")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    args.root = os.path.abspath(args.root)
    args.programs = "bench" if os.path.exists(os.path.join(args.root, "bench/bench_gpu_ops")) else "bench/gpu"
    rate = rates(args)
    print("| what | value | asked | |\n|---|---|---|---|")
    if "adamw" in rate:
        ratio = rate["adamw"] / rate["copy"]
        say("AdamW's bandwidth over a copy's", f"{ratio:.3f}", "at least 0.93", ratio >= 0.93)
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-", dir=args.out) as work:
        bench = Bench(args, work)
        for word in args.sizes.split(","):
            size, micro = word.split(":")
            one_size(bench, size, int(micro), rate)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
