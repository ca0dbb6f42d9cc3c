#!/usr/bin/env python3
"""GPT-2 on one GPU, in bf16: every strategy at world size 1, beside PyTorch in the same run.

  tests/bench/gpu/run.py [--root BUILD] [--out DIR] [--sizes 124M:32,1558M:8] [--steps 30] [--rounds 3] [--no-torch]

Rounds interleave the programs; a ratio is formed within a round, and the median of the rounds is printed.  A run's
time is the median of its step times, the first third left out.  Each run is a line as it ends, and one that fails a row
of its own, not met; the rows stand below.  "Copies forced": one rank that gathers and reduces as several do.

MFU is flops_per_token x tokens/s over a rate, flops_per_token = 6 (12 L C^2 + V C) + 12 L C T (a product's multiply and
add counted as two, forward and twice that backward, all of attention's T x T): once over 989 TFLOP/s, the dense bf16
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
              "zero 1": "zero stage=1", "zero 2": "zero stage=2", "zero 3": "zero stage=3",
              "fsdp full, copies forced": "fsdp gather_alone=yes",
              "zero 3, copies forced": "zero stage=3 gather_alone=yes",
              "ddp, deterministic": "ddp run.deterministic=yes"}
LEAST_MFU = {"124M": 0.45, "1558M": 0.55}
missed = False


class Failed(Exception):
    """A run that gave no result: its last words."""


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
        for s in [o if "." in o.split("=")[0] else f"{name}.{o}" for o in options] + list(sets):
            command += ["--set", s]
        done = finished(command)
        with open(os.path.join(out, "run.json"), encoding="utf-8") as f:
            run = json.load(f)
        with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
            steps = [s for s in map(json.loads, f) if "loss" in s]
        shutil.rmtree(out)
        run["said"] = done.stdout + done.stderr
        run["seconds"] = statistics.median(s["step_ms"] for s in steps[len(steps) // 3:]) / 1e3
        run["steps"] = steps
        run["held"] = sum(sum(k["measured"]) for k in run["result"]["bytes"].values())
        run["device"] = sum(run["memory"]["peak"]["device"])
        run["driver"] = sum(run["memory"].get("driver", [0]))
        return run

    def torch(self, variant, size, micro):
        command = [sys.executable, os.path.join(HERE, "torch_gpt2.py"), variant, size, "--micro", str(micro),
                   "--sequence", str(SEQUENCE), "--steps", str(self.args.steps)]
        return json.loads(finished(command).stdout.strip().splitlines()[-1])


def finished(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"not done after {late.timeout:.0f} s") from late
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Failed(f"status {done.returncode}: {words[-1][:200]}")
    return done


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


def kinds_of_work(run):
    """Milliseconds by kind of kernel, copy and collective, of a whole run with [cuda] profile = yes."""
    return {name: float(ms) for name, ms in re.findall(r"profile: (\w+): ([0-9.]+) ms", run["said"])}


def kinds_of_a_step(brief, long):
    """Milliseconds of a step by kind: two runs differ by steps only, so their start and end do not count."""
    before, after = kinds_of_work(brief), kinds_of_work(long)
    steps = len(long["steps"]) - len(brief["steps"])
    return {name: max(ms - before.get(name, 0), 0) / steps for name, ms in after.items()}


def one_run(results, name, title, number, run):
    """One more of results[name], or a row with the reason and none of it any more."""
    try:
        result = run(name)
    except Failed as why:
        say(title, f"failed: {why}", "runs", False)
        del results[name]
        return
    results[name].append(result)
    print(f"{title}, round {number + 1}: {result['seconds'] * 1e3:.1f} ms", file=sys.stderr, flush=True)


def gib(run, name):
    return f"{run[name] / 2 ** 30:.1f}"


def over(those, these):
    """Median of the ratios of rounds, or None where either did not run."""
    if not those or not these:
        return None
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(those, these))


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
            one_run(ours, strategy, f"{size} {strategy}", i, lambda s: bench.phalanx(size, micro, s))
        for variant in list(theirs):
            one_run(theirs, variant, f"{size} PyTorch {variant}", i, lambda v: bench.torch(v, size, micro))
    for strategy, runs in ours.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        per_s = tokens / seconds
        flops = flops_per_token(size) * per_s
        least = LEAST_MFU.get(size) if strategy == "ddp" else None
        say(f"{size} {strategy}: ms, tokens/s, GiB held; peak on the device, its driver's count",
            f"{seconds * 1e3:.1f}, {per_s:.0f}, {gib(runs[0], 'held')}; {gib(runs[0], 'device')}, "
            f"{gib(runs[0], 'driver')}")
        say(f"{size} {strategy}: MFU of 989, of the product measured",
            f"{flops / SHEET:.3f}, {flops / rate['product']:.3f}",
            f"at least {least}" if least else "", least is None or flops / SHEET >= least)
        ratio = over(runs, ours.get("ddp" if "deterministic" in strategy else "bare"))
        if strategy == "ddp, deterministic" and ratio:
            say(f"{size} ddp, deterministic over ddp, step time", f"{ratio:.3f}")
        elif strategy != "bare" and ratio:
            say(f"{size} {strategy} over bare, step time", f"{ratio:.3f}", "at most 1.02", ratio <= 1.02)
    for variant, results in theirs.items():
        ratio = over(results, ours.get("ddp"))
        asked = "at least 1.10" if variant == "plain" and ratio else ""
        say(f"{size} PyTorch {results[0]['version']} {variant}: ms, GiB; its step over ddp's",
            f"{statistics.median(t['seconds'] for t in results) * 1e3:.1f}, {gib(results[0], 'peak')}; "
            + (f"{ratio:.3f}" if ratio else "ddp did not run"),
            asked, not asked or ratio >= 1.10)
    few = max(args.steps // 3, 1)
    try:
        brief, long = (bench.phalanx(size, micro, "ddp", ["cuda.profile=yes", f"run.steps={steps}"])
                       for steps in (few, max(args.steps, few + 1)))
    except Failed as why:
        say(f"{size} profile", f"failed: {why}", "runs", False)
        return
    profile, step = kinds_of_a_step(brief, long), long["seconds"] * 1e3
    for name, ms in sorted(profile.items(), key=lambda x: -x[1]):
        say(f"{size} ms of a step in {name}", f"{ms:.2f} ({100 * ms / step:.0f} %)")
    total = sum(profile.values())
    say(f"{size} ms of a step in all of these, and the step", f"{total:.2f}, {step:.2f} ({100 * total / step:.0f} %)")


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
