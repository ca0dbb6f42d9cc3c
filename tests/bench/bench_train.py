#!/usr/bin/env python3
"""Benchmarks of whole training runs: train, overlap, overhead, saves.  Started by tests/bench/run.

Every figure is a ratio of neighbours: in each round the runs that are compared follow one another (every second round
in reverse), a ratio is formed within the round, and the median and the spread over the rounds are printed.  A run's
time is the median of its step times without the first; runs are pinned, one rank per core and one thread per rank.
What is compared must compute the same: losses of A and B are compared, and a line whose losses differ is void.
"""
import argparse
import array
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
missed = False
header_printed = False


# ---- runs ----

class Run:
    """What is kept of a finished run."""

    def __init__(self, out):
        with open(os.path.join(out, "run.json"), encoding="utf-8") as f:
            self.result = json.load(f)["result"]
        with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        steps = [s for s in lines if "loss" in s]
        self.losses = [s["loss"] for s in steps]
        self.saves = [s["checkpoint"] for s in steps if "checkpoint" in s]  # those that other steps stood beside
        self.hash = self.result["state_hash"]
        self.seconds = statistics.median(s["step_ms"] for s in steps[1:] or steps) / 1e3

    def on_the_wire(self):
        """Planned bytes of a step at 2 ranks, of each call those of the rank that moves more: the others wait for it.
        At 2 ranks a broadcast is moved by one of them, and a reduce wholly by one and half by the root."""
        share = {"broadcast": 1, "reduce": 2 / 3}
        return sum(sum(op["planned"]) * share.get(name, 1 / 2) for name, op in self.result["sent"].items())


class Bench:
    def __init__(self, build, work, quick):
        self.build, self.work, self.quick = build, work, quick
        self.cores = sorted(os.sched_getaffinity(0))
        self.number = 0

    def rounds(self, n):
        return 1 if self.quick else n

    def need_cores(self, n):
        if len(self.cores) < n:
            print(f"needs {n} cores, and there are {len(self.cores)}: skipped")
            sys.exit(1)

    def ini(self, name, vocabulary, sequence, text):
        """An INI with a token file in which every sample is the same: ranks that see different samples, or more of
        them, then have the same loss."""
        pattern = [(i * 7919 + 13) % vocabulary for i in range(sequence)]
        path = os.path.join(self.work, name)
        with open(path + ".bin", "wb") as f:
            array.array("H", pattern * 128 + pattern[:1]).tofile(f)
        with open(path + ".ini", "w", encoding="utf-8") as f:
            f.write(f"[data]\ntrain = {path}.bin\n[device]\nthreads = 1\n[optimizer]\nlr = 1e-5\n"
                    f"[plugins]\npath = {os.path.join(self.build, 'lib/phalanx-test')}\n{text}")
        return path + ".ini"

    def start(self, ini, strategy, ranks=1, core=0, sets=()):
        """strategy: a name and its options, 'zero stage=3'."""
        self.number += 1
        out = os.path.join(self.work, f"run{self.number}")
        name, *options = strategy.split()
        command = [os.path.join(self.build, "bin/phalanx"), "train", ini, "-n", str(ranks), "--strategy", name,
                   "--set", f"run.out={out}", "--set", f"run.pin={'yes' if ranks > 1 else 'no'}"]
        for s in [f"{name}.{o}" for o in options] + list(sets):
            command += ["--set", s]
        cores = set(self.cores[:ranks]) if ranks > 1 else {self.cores[core]}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   preexec_fn=lambda: os.sched_setaffinity(0, cores))
        return process, out, command

    def finish(self, started):
        process, out, command = started
        try:
            text, _ = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        if process.returncode != 0:
            sys.exit(f"status {process.returncode} of {' '.join(command)}\n{text}")
        run = Run(out)
        shutil.rmtree(out)
        return run

    def train(self, *args, **kwargs):
        return self.finish(self.start(*args, **kwargs))


# ---- lines ----

def median_interval(x):
    """Order statistics that hold the median with at least 95 %, or least and greatest where there are too few."""
    x, n = sorted(x), len(x)
    k, tail = 0, 0.0
    while k < n // 2 and tail + math.comb(n, k) / 2 ** n <= 0.025:
        tail += math.comb(n, k) / 2 ** n
        k += 1
    k = max(k - 1, 0)
    return x[k], x[n - 1 - k]


def line(name, a, b, ratios, least=None, most=None, void=None, detail="", interval=False):
    global missed, header_printed
    ratio = statistics.median(ratios)
    met = (least is None or ratio >= least) and (most is None or ratio <= most)
    verdict = f"VOID: {void}" if void else "for information" if least is most else "met" if met else "NOT MET"
    missed = missed or bool(void) or not met
    spread = f"{min(ratios):.3f} .. {max(ratios):.3f}, {len(ratios)} pairs"
    if interval:
        spread += ", 95 %% of the median: %.4f .. %.4f" % median_interval(ratios)
    asked = f"at least {least:g}" if least is not None else f"at most {most:g}" if most is not None else ""
    if not header_printed:
        print("| what | A | B | A, B | A / B (least .. greatest) | asked | |\n|---|---|---|---|---|---|---|")
        header_printed = True
    print(f"| {name} | {a} | {b} | {detail} | **{ratio:.3f}** ({spread}) | {asked} | {verdict} |", flush=True)


def differ(a, b, tolerance=0.0):
    """Why two runs did not compute the same, or None."""
    for i, (x, y) in enumerate(zip(a.losses, b.losses)):
        if abs(x - y) > tolerance * abs(y) or not math.isfinite(x):
            return f"losses of step {i + 1} are {x:.17g} and {y:.17g}"
    if tolerance == 0.0 and a.hash != b.hash:
        return "states differ"
    return None


def first(reasons):
    return next((r for r in reasons if r), None)


def ms(runs):
    return statistics.median(r.seconds for r in runs) * 1e3


def plan_line(name, run):
    """Planned over measured, memory and traffic: exact, or missed."""
    global missed
    memory = [(sum(k["planned"]), sum(k["measured"]), k["planned"] == k["measured"])
              for k in run.result["bytes"].values()]
    sent = [(sum(o["planned"]), sum(o["measured"]), o["planned"] == o["measured"])
            for o in run.result["sent"].values()]
    for what, rows in (("memory", memory), ("sent", sent)):
        planned, measured = sum(r[0] for r in rows), sum(r[1] for r in rows)
        exact = all(r[2] for r in rows)
        missed = missed or not exact
        ratio = f"{planned / measured:.4f}" if measured else "1.0000" if planned == 0 else "inf"
        print(f"{name}: {what} planned / measured, all ranks: {planned} / {measured} = {ratio},",
              "exact for every kind and rank" if exact else "NOT EXACT", flush=True)


def rotated(items, i):
    return items if i % 2 == 0 else list(reversed(items))


# ---- (a) GPT-2 124M ----

def train(bench):
    bench.need_cores(2)
    layers, c, v, micro, t = 12, 768, 50257, 4, 256
    flops_per_token = 6 * (12 * layers * c * c + v * c) + 12 * layers * c * t
    ini = bench.ini("gpt2", v, t, f"[batch]\nmicro = {micro}\nsequence = {t}\n[model]\nplugin = gpt\nsize = 124M\n"
                    "[run]\nsteps = 2\n")
    pinned = lambda: os.sched_setaffinity(0, {bench.cores[0]})
    names = ["ddp", "zero stage=1", "zero stage=2", "fsdp sharding=full", "zero stage=3"]
    rounds = bench.rounds(7)
    products, single, copies, runs = [], [], [], {n: [] for n in names}
    for i in range(rounds):
        for what in rotated(["products", "single", "copies"] + names, i):
            if what == "products":
                text = subprocess.run([os.path.join(bench.build, "bench/bench_products")], check=True, text=True,
                                      stdout=subprocess.PIPE, preexec_fn=pinned).stdout
                products.append(json.loads(text))
            elif what == "single":
                single.append(bench.train(ini, "ddp"))
            elif what == "copies":
                both = [bench.start(ini, "ddp", core=k) for k in (0, 1)]
                copies.append([bench.finish(s) for s in both])
            else:
                runs[what].append(bench.train(ini, what, ranks=2))
        print(f"round {i + 1} of {rounds}: product rate {products[i]['rate'] / 1e9:.1f} GFLOP/s; step in ms: 1 rank "
              f"{single[i].seconds * 1e3:.0f}, copies {copies[i][0].seconds * 1e3:.0f} and "
              f"{copies[i][1].seconds * 1e3:.0f}, 2 ranks " +
              ", ".join(f"{n} {runs[n][i].seconds * 1e3:.0f}" for n in names), file=sys.stderr, flush=True)
    tokens = micro * t
    rates = [tokens * flops_per_token / r.seconds for r in single]
    line("GPT-2 124M fp32, model FLOP/s of a step over the product rate", "ddp, 1 rank",
         f"{products[0]['version']} dnnl_sgemm, shapes weighted", [a / p["rate"] for a, p in zip(rates, products)],
         least=0.80, detail=f"{statistics.median(rates) / 1e9:.1f}, "
         f"{statistics.median(p['rate'] for p in products) / 1e9:.1f} GFLOP/s")
    alone = [sum(tokens / r.seconds for r in pair) for pair in copies]
    ddp = [2 * tokens / r.seconds for r in runs["ddp"]]
    # the same samples, summed over two ranks: equal but for rounding
    line("tokens/s at 2 ranks", "ddp", "two independent copies at once", [a / b for a, b in zip(ddp, alone)],
         least=0.97, detail=f"{statistics.median(ddp):.1f}, {statistics.median(alone):.1f} tokens/s",
         void=first(differ(a, b, 1e-4) for a, p in zip(runs["ddp"], copies) for b in p))
    for name in names[1:]:
        line("tokens/s at 2 ranks", name, "ddp", [b.seconds / a.seconds for a, b in zip(runs[name], runs["ddp"])],
             least=0.99 if name in ("zero stage=1", "zero stage=2") else 0.95,
             detail=f"{ms(runs[name]):.0f}, {ms(runs['ddp']):.0f} ms a step",
             void=first(differ(a, b) for a, b in zip(runs[name], runs["ddp"])))
    for name in names:
        plan_line(f"{name}, 2 ranks", runs[name][-1])


# ---- (b) overlap ----

def overlap(bench):
    """On the test communicator `wire`: shm whose calls take payload / bandwidth longer, asleep."""
    bench.need_cores(2)
    ini = bench.ini("overlap", 512, 128, "[batch]\nmicro = 4\nsequence = 128\n[run]\nsteps = 7\n[comm]\nplugin = wire\n"
                    "[model]\nplugin = gpt\nlayers = 16\nheads = 4\nwidth = 256\ncontext = 128\nvocab = 512\n")
    # buckets and prefetch in proportion to a model of 50 MB: about half a block's gradients, two blocks ahead
    buckets = {"ddp": "ddp bucket_bytes=1572864 first_bucket_bytes=524288",
               "fsdp full": "fsdp sharding=full prefetch=1",
               "zero 2": "zero stage=2 reduce_bucket_size=393216",
               "zero 3": "zero stage=3 reduce_bucket_size=393216 stage3_prefetch_bucket_size=1600000",
               "fsdp full, prefetch = 0": "fsdp sharding=full prefetch=0"}
    rounds = bench.rounds(7)
    wire, compute, speed = {n: [] for n in buckets}, {n: [] for n in buckets}, {n: [] for n in buckets}
    known = {name: [bench.train(ini, strategy, ranks=2)] for name, strategy in buckets.items()}
    for i in range(rounds):
        for name in rotated(list(buckets), i):
            for wired in rotated([False, True], i):
                # communication takes half of compute, as far as that is known by now
                bandwidth = known[name][0].on_the_wire() / (0.5 * statistics.median(r.seconds for r in known[name]))
                sets = [f"wire.bandwidth={bandwidth:.0f}"] if wired else []
                run = bench.train(ini, buckets[name], ranks=2, sets=sets)
                if wired:
                    wire[name].append(run)
                    speed[name].append(bandwidth)
                else:
                    compute[name].append(run)
                    known[name].append(run)
    for name in buckets:
        share = [a.on_the_wire() / bw / b.seconds for a, bw, b in zip(wire[name], speed[name], compute[name])]
        prefetch = name.endswith("= 0")
        line("overlap, communication half of compute: step over compute", name, "the same without the wire",
             [a.seconds / b.seconds for a, b in zip(wire[name], compute[name])], most=None if prefetch else 1.15,
             detail=f"{ms(wire[name]):.0f}, {ms(compute[name]):.0f} ms; communication "
             f"{wire[name][0].on_the_wire() / 1e6:.1f} MB, {statistics.median(share):.2f} of compute: "
             f"synchronous would be {1 + statistics.median(share):.2f}",
             void=first(differ(a, b) for a, b in zip(wire[name], compute[name])))
    slow, fast = wire["fsdp full, prefetch = 0"], wire["fsdp full"]
    line("fsdp full on the wire: step time", "prefetch = 0", "prefetch = 1",
         [a.seconds / b.seconds for a, b in zip(slow, fast)], least=1.03,
         detail=f"{ms(slow):.0f}, {ms(fast):.0f} ms", void=first(differ(a, b) for a, b in zip(slow, fast)))


# ---- (d) overhead ----

def copy_rate():
    """Bytes read and written per second by memcpy of 128 MiB."""
    a, b = bytearray(128 << 20), bytearray(128 << 20)
    best = 1e9
    for _ in range(5):
        begin = time.perf_counter()
        memoryview(b)[:] = a
        best = min(best, time.perf_counter() - begin)
    return 2 * len(a) / best


def overhead(bench):
    """At world size 1, over the test strategy `bare`."""
    names = {"ddp": "ddp", "fsdp full": "fsdp", "zero 1": "zero stage=1", "zero 2": "zero stage=2",
             "zero 3": "zero stage=3"}
    layers = 12
    shape = "[model]\nplugin = gpt\nlayers = %d\nheads = 4\nwidth = %d\ncontext = 128\nvocab = %d\n" \
            "[batch]\nmicro = %d\nsequence = %d\n[run]\nlog_every = 1000\nsteps = %d\n"
    ini = bench.ini("overhead", 512, 128, shape % (layers, 192, 512, 4, 128, 8))
    # the same calls with next to no compute; as many buckets as there can be
    empty = bench.ini("calls", 8, 1, shape % (layers, 8, 8, 1, 1, 400))
    small = {"ddp": "ddp bucket_bytes=4096 first_bucket_bytes=4096", "fsdp full": "fsdp",
             "zero 1": "zero stage=1 reduce_bucket_size=1024", "zero 2": "zero stage=2 reduce_bucket_size=1024",
             "zero 3": "zero stage=3 reduce_bucket_size=1024 stage3_param_persistence_threshold=0"}
    runs, calls = {n: [] for n in ["bare", *names]}, {n: [] for n in ["bare", *names]}
    for i in range(bench.rounds(30)):
        for name in rotated(list(runs), i):
            runs[name].append(bench.train(ini, names.get(name, "bare")))
            if i % 3 == 0:
                calls[name].append(bench.train(empty, small.get(name, "bare")))
    n_calls = 4 * (layers + 2) + 4  # acquire, release of each stage, twice; begin, finish, norm, update
    bandwidth = copy_rate()
    bare = runs["bare"]
    held = lambda r: sum(sum(k["measured"]) for k in r.result["bytes"].values())
    for name in names:
        line("overhead at world size 1: step time", name, "bare",
             [a.seconds / b.seconds for a, b in zip(runs[name], bare)], most=1.02,
             detail=f"{ms(runs[name]):.2f}, {ms(bare):.2f} ms", interval=True,
             void=first(differ(a, b) for a, b in zip(runs[name], bare)))
    print(f"Bound: (calls x ns per call + extra bytes / bandwidth) / step.  Calls of a step: acquire and release of "
          f"{layers + 2} stages,\n"
          f"forward and backward, and begin_micro_batch, finish_gradients, gradient_norm, update = {n_calls}.  "
          "ns per call: step of a model of\n"
          "width 8 and 1 token under the strategy, with a bucket per 4 KiB of gradient, less that under bare, "
          "over the calls.  Extra\n"
          "bytes: what a strategy copies must lie somewhere: all memory it holds beyond bare's, "
          "read and written once a step.\n"
          f"Bandwidth: memcpy, {bandwidth / 1e9:.1f} GB/s read and written.")
    for name in names:
        ns = statistics.median((a.seconds - b.seconds) / n_calls * 1e9 for a, b in zip(calls[name], calls["bare"]))
        extra = max(0, held(runs[name][0]) - held(bare[0]))
        step = statistics.median(r.seconds for r in bare)
        bound = (n_calls * max(ns, 0.0) * 1e-9 + 2 * extra / bandwidth) / step
        global missed
        missed = missed or bound > 0.005
        print(f"bound, {name}: ({n_calls} x {ns:.0f} ns + 2 x {extra} B / {bandwidth / 1e9:.1f} GB/s) / "
              f"{step * 1e3:.2f} ms = {100 * bound:.3f} %, asked at most 0.5 %: "
              f"{'met' if bound <= 0.005 else 'NOT MET'}", flush=True)


# ---- checkpoints beside training ----

def saves(bench):
    """How long training stands still for a save in the background, over a save that it waits for; 2 ranks."""
    bench.need_cores(2)
    ini = bench.ini("saves", 8192, 256,
                    "[model]\nplugin = gpt\nlayers = 6\nheads = 6\nwidth = 384\ncontext = 256\nvocab = 8192\n"
                    "[batch]\nmicro = 4\nsequence = 256\n[run]\nlog_every = 1000\nsteps = 7\n[checkpoint]\nevery = 2\n")
    kinds = {"background": "yes", "waited for": "no"}
    for strategy in ["fsdp"]:
        runs = {kind: [] for kind in kinds}
        for i in range(bench.rounds(3)):
            for kind in rotated(list(kinds), i):
                runs[kind].append(bench.train(ini, strategy, 2, sets=[f"checkpoint.background={kinds[kind]}"]))
        stall = {kind: [statistics.mean(s["stall_ms"] for s in r.saves) for r in runs[kind]] for kind in kinds}
        a, b = stall["background"], stall["waited for"]
        line(f"stall of a save in the background ({strategy})", "background", "waited for",
             [x / y for x, y in zip(a, b)], most=0.10,
             detail=f"{statistics.median(a):.1f}, {statistics.median(b):.1f} ms",
             void=first(differ(x, y) for x, y in zip(runs["background"], runs["waited for"])))
        last = runs["background"][-1].saves
        parts = ", ".join(f"{last[-1][k]:.2f}" for k in ("begin_ms", "copies_ms", "waits_ms", "commit_ms"))
        print(f"one of them: {last[-1]['bytes'] / 1e6:.0f} MB in {last[-1]['seconds']:.3f} s; "
              f"begin, copies, waits, commit: {parts} ms; "
              f"step {ms(runs['background']):.0f} ms beside saves, {ms(runs['waited for']):.0f} ms between them",
              flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "overlap", "overhead", "saves"])
    parser.add_argument("--build", default=os.path.join(SOURCE, "build"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    build = os.path.abspath(args.build)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=build) as work:
        what = {"train": train, "overlap": overlap, "overhead": overhead, "saves": saves}[args.what]
        what(Bench(build, work, args.quick))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
