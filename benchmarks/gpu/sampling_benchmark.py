"""DIFFUSION SAMPLING on a GPU: torch.classes.deeppcr.Sampling against the same sampler step after step, captured whole in
a CUDA graph.

    sampling_benchmark.py libdeeppcr_nn.so [--model denoiser.pt] [--json FILE] [--quick]

The model: a TorchScript file, forward(x [rows, 32], t [rows]), or, without --model, residual blocks of 256 hidden numbers,
trained here for a few seconds on points of a mixture of ten Gaussians in 32 dimensions. Every result is compared with the
sequential one of the same noise before it is timed; a difference of more than 1/255 of the range, which is 2, does not count,
and says so. Medians over rounds in which all take turns, with the quartiles in the JSON. Markdown goes to standard
output. --quick: few steps, on the processor where there is no GPU: does it work?
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import torch

arguments = argparse.ArgumentParser()
arguments.add_argument("library")
arguments.add_argument("--model")
arguments.add_argument("--json")
arguments.add_argument("--quick", action="store_true")
arguments = arguments.parse_args()
on_gpu = torch.cuda.is_available()
if not on_gpu and not arguments.quick:
    sys.exit(f"torch {torch.__version__} has no GPU to use: there is nothing to measure")
torch.ops.load_library(arguments.library)
device = "cuda" if on_gpu else "cpu"
numbers, times = 32, 1000
allowed = 2 / 255
kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, times, dtype=torch.double), 0)


class Denoiser(torch.nn.Module):
    def __init__(self, hidden: int = 256, blocks: int = 4):
        super().__init__()
        self.into, self.out = torch.nn.Linear(numbers, hidden), torch.nn.Linear(hidden, numbers)
        self.of_time = torch.nn.Linear(64, hidden)
        self.first = torch.nn.ModuleList([torch.nn.Linear(hidden, hidden) for _ in range(blocks)])
        self.second = torch.nn.ModuleList([torch.nn.Linear(hidden, hidden) for _ in range(blocks)])
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -9.2, 32)))

    def forward(self, x, t):
        angles = t[:, None] * self.frequencies
        time_features = self.of_time(torch.cat([torch.sin(angles), torch.cos(angles)], 1))
        h = self.into(x)
        for first, second in zip(self.first, self.second):
            h = h + second(torch.nn.functional.silu(first(torch.nn.functional.silu(h)) + time_features))
        return self.out(h)


def trained_model(path):
    torch.manual_seed(1)
    network = Denoiser().to(device)
    centres, widths = torch.randn(10, numbers, device=device), 0.1 + 0.3 * torch.rand(10, 1, device=device)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    signal, deviation = kept.sqrt().float().to(device), (1 - kept).sqrt().float().to(device)
    for _ in range(20 if arguments.quick else 3000):
        which = torch.randint(10, (1024,), device=device)
        sample = centres[which] + widths[which] * torch.randn(1024, numbers, device=device)
        t, z = torch.randint(times, (1024,), device=device), torch.randn(1024, numbers, device=device)
        loss = (network(signal[t, None] * sample + deviation[t, None] * z, t.float()) - z).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.jit.script(network.eval()).save(path)
    return float(loss)


def ddim_numbers(steps):
    """Of each step, trailing: its time, and state' = a state + b prediction."""
    visited = [round(times - i * times / steps) - 1 for i in range(steps)]
    levels = [float(kept[t]) for t in visited] + [1.0]
    result = []
    for i, t in enumerate(visited):
        signal, noise = levels[i] ** 0.5, (1 - levels[i]) ** 0.5
        to_signal, to_noise = levels[i + 1] ** 0.5, (1 - levels[i + 1]) ** 0.5
        result.append((t, to_signal / signal, to_noise - to_signal * noise / signal))
    return result


class Sequential:
    """DDIM step after step: on a GPU all steps in one CUDA graph."""

    def __init__(self, path, images, steps):
        self.network = torch.jit.load(path, map_location=device).eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        self.plan = [(torch.full((images,), float(t), device=device), a, b) for t, a, b in ddim_numbers(steps)]
        self.noise = torch.zeros(images, numbers, device=device)
        self.graph = None
        if on_gpu:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.loop()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = self.loop()

    @torch.no_grad()
    def loop(self):
        x = self.noise
        for t, a, b in self.plan:
            x = torch.add(x * a, self.network(x, t), alpha=b)
        return x

    def __call__(self):
        if self.graph is None:
            return self.loop()
        self.graph.replay()
        return self.result


class Parallel:
    def __init__(self, path, images, steps, surrogate, tolerance, noise):
        make = lambda passes: torch.classes.deeppcr.Sampling(
            path, [numbers], images, "ddim", steps, "trailing", 0.0, "noise", "linear", times, "newton", surrogate,
            tolerance, passes, device)
        self.eager = make(0)
        self.eager.draw(noise, None, None)
        before = self.eager.dependent_calls()
        self.eager.sample()
        self.ok, self.iterations = self.eager.ok(), self.eager.iterations()
        self.dependent_calls = self.eager.dependent_calls() - before
        self.stream = None
        if on_gpu and self.ok:
            self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            with torch.cuda.stream(self.stream):
                self.captured = make(self.iterations + 1)
                self.captured.enqueue()
                self.captured.finish()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.captured.enqueue()
            self.captured.draw(noise, None, None)
            torch.cuda.synchronize()

    def replay(self):
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            return self.captured.finish()  # waits, and tells whether it is right


def milliseconds(function):
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def measure(competitors, rounds):
    for function in competitors.values():
        function()
    found = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, function in competitors.items():
            found[name].append(milliseconds(function))
    result = {}
    for name, values in found.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median_ms": median, "quartiles_ms": [low, high]}
    return result


name = torch.cuda.get_device_name() if on_gpu else "processor"
print(f"{name}, torch {torch.__version__}. DDIM; milliseconds, medians; the baseline is the same sampler step after step"
      f"{', captured in a CUDA graph' if on_gpu else ''}.\n")
print("| steps | images | Jacobian | tolerance | passes | calls that wait | difference | sequential | parallel | ratio "
      "| in a graph | ratio |")
print("|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
results = []
with tempfile.TemporaryDirectory() as folder:
    path = arguments.model or os.path.join(folder, "denoiser.pt")
    loss = None if arguments.model else trained_model(path)
    for steps in (20,) if arguments.quick else (1000, 100):
        for images in (1, 3) if arguments.quick else (1, 16):
            sequential = Sequential(path, images, steps)
            noise = torch.randn(images, numbers, generator=torch.Generator().manual_seed(images)).to(device)
            sequential.noise.copy_(noise)
            expected = sequential().clone()
            for surrogate, tolerance in (("full", 1e-4), ("full", 1e-5), ("diagonal", 1e-4), ("diagonal", 1e-5),
                                         ("diagonal", 1e-6)):
                parallel = Parallel(path, images, steps, surrogate, tolerance, noise)
                row = {"steps": steps, "images": images, "surrogate": surrogate, "tolerance": tolerance,
                       "iterations": parallel.iterations, "dependent_calls": parallel.dependent_calls, "loss": loss}
                line = f"| {steps:,} | {images} | {surrogate} | {tolerance:.0e} | {row['iterations']} "
                if not parallel.ok:
                    print(line + f"| did not converge: {parallel.eager.report()} |", flush=True)
                    continue
                row["difference"] = float((parallel.eager.sample() - expected).abs().max())
                competitors = {"sequential": sequential, "parallel": parallel.eager.sample}
                if parallel.stream is not None:
                    row["difference"] = max(row["difference"], float((parallel.replay() - expected).abs().max()))
                    competitors["graph"] = parallel.replay
                right = row["difference"] <= allowed  # so that NaN is wrong
                row |= {"right": right, "times": measure(competitors, 2 if arguments.quick else 15)}
                median = {key: value["median_ms"] for key, value in row["times"].items()}
                ratio = lambda key: (f"{median['sequential'] / median[key]:.2f}" if right else "wrong") if key in median else ""
                print(line + f"| {row['dependent_calls']} | {row['difference']:.1e} | {median['sequential']:.2f} "
                      f"| {median['parallel']:.2f} | {ratio('parallel')} "
                      f"| {format(median['graph'], '.2f') if 'graph' in median else ''} | {ratio('graph')} |", flush=True)
                results.append(row)
                if arguments.json:  # what is measured stays, should the next size take too long
                    with open(arguments.json, "w") as file:
                        json.dump({"device": name, "torch": torch.__version__, "command": sys.argv, "results": results},
                                  file, indent=1)
