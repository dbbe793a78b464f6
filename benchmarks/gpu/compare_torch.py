#!/usr/bin/env python3
"""ParaGRU and the scan of a diagonal system against what Python has on a GPU: torch's LSTM (cuDNN), ParaRNN's fused
kernel, scans by Triton and JAX. benchmarks/gpu.sh runs it; rows are written as gpu_benchmark writes its own.

Every result is verified over its whole length before it is timed, NaN fails; ours and the baseline take turns, and
medians are compared. Without a GPU (--device cpu, for tests of this program) nothing it says is a measurement of one.
"""
import argparse
import ctypes
import functools
import glob
import json
import os
import sys
import time

try:
    import torch
except ImportError:
    print("skipped: this Python has no torch")
    sys.exit(77)
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ENOUGH, TOO_MUCH, FEWEST, MOST, WARM_UP = 0.15, 2.0, 5, 200, 2  # seconds of a body, turns


class NotRun(Exception):
    """There is nothing to measure a row with or against here."""


class Device:
    def __init__(self, name, tiny):
        self.name, self.tiny = name, tiny

    def seconds(self, body, host_ahead=False):
        """Between events around `body` on a GPU, gaps included in which the GPU waits for it. host_ahead: the GPU is
        busy with something else while `body` is enqueued, as within a network."""
        if self.name == "cpu":
            begin = time.perf_counter()
            body()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if host_ahead:
            torch.cuda._sleep(600_000)  # cycles, 0.3 ms
        begin.record()
        body()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def take_turns(self, *bodies, host_ahead=False):
        """Runs all bodies one after the other, again and again: first for warming up, then until each has enough."""
        taken = [[] for _ in bodies]
        for turn in range(WARM_UP + (1 if self.tiny else MOST)):
            totals = [sum(seconds) for seconds in taken]
            if turn > WARM_UP + 1 and max(totals) > TOO_MUCH:
                break
            if turn >= WARM_UP + FEWEST and min(totals) > ENOUGH:
                break
            for body, seconds in zip(bodies, taken):
                now = self.seconds(body, host_ahead)
                if turn >= WARM_UP:
                    seconds.append(now)
        return [summary(seconds) for seconds in taken]

    def normal(self, *shape, dtype, seed, scale=1.0):
        generator = torch.Generator(self.name).manual_seed(seed)
        return (torch.randn(*shape, generator=generator, device=self.name) * scale).to(dtype)


def summary(seconds):
    ordered = sorted(seconds)
    return {
        "median": ordered[len(ordered) // 2],
        "lower_quartile": ordered[len(ordered) // 4],
        "upper_quartile": ordered[len(ordered) * 3 // 4],
        "runs": len(ordered),
    }


def difference(result, expected):
    """Of all elements, relative to the largest of `expected`; infinite where anything is not finite."""
    result, expected = result.double(), expected.double()
    if not (result.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return ((result - expected).abs().max() / expected.abs().max()).item()


def require(row, what, found, limit):
    row.setdefault("details", {})[what] = found
    if not found <= limit:
        raise RuntimeError(f"{what} is {found:.3g}, more than {limit:.3g}")


class Library:
    """libdeeppcr_gpu.so, by pointers."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.deeppcr_problem.restype = ctypes.c_char_p
        pointer, count = ctypes.c_void_p, ctypes.c_longlong
        self.library.deeppcr_para_gru.argtypes = [pointer] * 3 + [count] * 3 + [ctypes.c_int] * 2 + [ctypes.c_double]
        self.library.deeppcr_solve_diagonal.argtypes = [pointer] * 3 + [count] * 2

    def check(self, outcome):
        if outcome != 0:
            problem = self.library.deeppcr_problem().decode()
            raise NotRun(problem) if outcome == 2 else RuntimeError(problem)

    def para_gru(self, gates, parameters, sequential=False, tolerance=0.0):
        steps, batch, width = gates.shape[0], gates.shape[1], gates.shape[2] // 3
        states = torch.empty(steps, batch, width, dtype=gates.dtype, device=gates.device)
        bits = 8 * gates.element_size()
        self.check(
            self.library.deeppcr_para_gru(gates.data_ptr(), parameters.data_ptr(), states.data_ptr(), steps, batch,
                                          width, bits, int(sequential), tolerance))
        return states

    def solve_diagonal(self, a, b):
        x = torch.empty_like(b)
        self.check(self.library.deeppcr_solve_diagonal(a.data_ptr(), b.data_ptr(), x.data_ptr(), *a.shape))
        return x


class Operators:
    """torch.ops.deeppcr of libdeeppcr_nn.so."""

    def __init__(self, path):
        torch.ops.load_library(path)

    def para_gru(self, gates, parameters, sequential=False, tolerance=0.0):
        return torch.ops.deeppcr.para_gru(gates, parameters)


def step_after_step(gates, parameters):
    """ParaGRU as its equations have it, in double: the reference. gates [T,B,3D] (z, r, h), parameters [3,D]."""
    a = parameters.double()
    h = torch.zeros(gates.shape[1], gates.shape[2] // 3, dtype=torch.float64, device=gates.device)
    states = torch.empty(gates.shape[0], *h.shape, dtype=torch.float64, device=gates.device)
    for t in range(gates.shape[0]):
        z, r, c = gates[t].double().chunk(3, -1)
        z, r = torch.sigmoid(a[0] * h + z), torch.sigmoid(a[1] * h + r)
        h = h + z * (torch.tanh(a[2] * (r * h) + c) - h)
        states[t] = h
    return states


TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of relative differences


def measure_lstm(device, ours, row):
    """One layer of torch's LSTM against one of ParaGRU: both with the projection of the inputs."""
    batch, width, steps = (2, 6, 20) if device.tiny else (16, 768, 1024)
    dtype = torch.float32 if device.name == "cpu" else torch.bfloat16
    row.update(shape=f"T = {steps}, B = {batch}, hidden {width}", type=TYPES[dtype])
    torch.manual_seed(1)
    lstm = torch.nn.LSTM(width, width).to(device.name, dtype)
    lstm.flatten_parameters()
    inputs = device.normal(steps, batch, width, dtype=dtype, seed=2)
    weights = device.normal(3 * width, width, dtype=dtype, seed=3, scale=width**-0.5)
    biases = device.normal(3 * width, dtype=dtype, seed=4)
    parameters = device.normal(3, width, dtype=dtype, seed=5, scale=0.5).float()  # ours are float for bf16 too

    def layer():
        return ours.para_gru(torch.nn.functional.linear(inputs, weights, biases), parameters)

    gates = torch.nn.functional.linear(inputs, weights, biases)
    require(row, "difference from double, step after step", difference(layer(), step_after_step(gates, parameters)),
            LIMITS[dtype])
    if not lstm(inputs)[0].isfinite().all():
        raise RuntimeError("torch's LSTM is not finite")
    row["seconds"], row["baseline_seconds"], alone = device.take_turns(layer, lambda: lstm(inputs),
                                                                       lambda: ours.para_gru(gates, parameters))
    row["details"]["seconds without the projection"] = alone


@functools.lru_cache(maxsize=1)
def against_pararnn(device, ours, extension, dtype, steps, batch, width):
    """Ours, theirs, what their results differ by from double, verified, and a function that verifies ours again."""
    torch.ops.load_library(extension)
    gates = device.normal(steps, batch, 3 * width, dtype=dtype, seed=6)
    parameters = device.normal(3, width, dtype=dtype, seed=7, scale=0.5).float()  # the same numbers, ours in float
    theirs_a = parameters.t().to(dtype).contiguous()
    theirs_b = gates.view(steps, batch, 3, width).permute(1, 3, 0, 2).contiguous()

    def theirs():
        return torch.ops.parallel_reduce_cuda.fused_fwd_gru_diag_mh(theirs_a, theirs_b)

    def mine():
        return ours.para_gru(gates, parameters)

    expected = step_after_step(gates, parameters)
    verified = {"details": {"error of the baseline": difference(theirs().permute(2, 0, 1), expected)}}
    allowed = max(verified["details"]["error of the baseline"], LIMITS[dtype])

    def verify(row):
        require(row, "error", difference(mine(), expected), allowed)

    verify(verified)
    return mine, theirs, verified["details"], verify


def measure_pararnn(device, ours, checkout, dtype, steps, batch, width, host_ahead, row):
    """The fused kernel alone, in its own layouts: [D,3] and [B,D,T,3], without the transpositions that lead to them."""
    row.update(shape=f"T = {steps}, B = {batch}, D = {width}", type=TYPES[dtype])
    if not checkout:
        raise NotRun("no checkout of ParaRNN was given (--pararnn)")
    built = glob.glob(os.path.join(checkout, "*parallel_reduce_cuda*.so"))
    if not built:
        raise NotRun(f"there is no built extension in {checkout}")
    mine, theirs, details, verify = against_pararnn(device, ours, built[0], dtype, steps, batch, width)
    row["details"] = dict(details)
    row["seconds"], row["baseline_seconds"] = device.take_turns(mine, theirs, host_ahead=host_ahead)
    verify(row)  # by what the calls that were timed have made of it


if triton is not None:

    @triton.jit
    def compose(a_first, b_first, a_second, b_second):
        return a_second * a_first, a_second * b_first + b_second

    @triton.jit
    def scan_kernel(a_pointer, b_pointer, x_pointer, steps, width, rows: tl.constexpr, columns: tl.constexpr):
        """A program per `columns` columns; `rows` steps at a time, scanned from the state before them."""
        column = tl.program_id(0) * columns + tl.arange(0, columns)
        row = tl.arange(0, rows)
        state = tl.zeros([columns], tl.float32)
        for first in range(0, steps, rows):
            at = (first + row)[:, None].to(tl.int64) * width + column[None, :]
            inside = ((first + row) < steps)[:, None] & (column < width)[None, :]
            factors = tl.load(a_pointer + at, inside, 0.0)
            summands = tl.load(b_pointer + at, inside, 0.0)
            products, sums = tl.associative_scan((factors, summands), 0, compose)
            states = products * state[None, :] + sums
            tl.store(x_pointer + at, states, inside)
            state = tl.sum(tl.where((row == rows - 1)[:, None], states, 0.0), 0)


def scan_by_triton(a, b):
    if triton is None:
        raise NotRun("there is no Triton here")
    x = torch.empty_like(b)

    def run():
        scan_kernel[(triton.cdiv(a.shape[1], 32),)](a, b, x, *a.shape, 64, 32)
        return x

    return run


def scan_by_jax(a, b):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError as error:
        raise NotRun("there is no JAX here") from error

    there_a, there_b = jax.dlpack.from_dlpack(a), jax.dlpack.from_dlpack(b)

    def compose(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    scan = jax.jit(lambda p, q: jax.lax.associative_scan(compose, (p, q))[1])

    def run():
        return torch.from_dlpack(scan(there_a, there_b).block_until_ready())

    return run


def measure_scan(device, library, make, row):
    steps, width = (70, 40) if device.tiny else (4096, 16384)
    row.update(shape=f"[{steps}, {width}]", type="float")
    if library is None:
        raise NotRun("libdeeppcr_gpu.so was not given (--library)")
    generator = torch.Generator(device.name).manual_seed(8)
    a, b = (torch.rand(steps, width, generator=generator, device=device.name) * 1.8 - 0.9 for _ in range(2))
    theirs = make(a, b)
    require(row, "difference", difference(theirs(), library.solve_diagonal(a, b)), 1e-5)
    row["bytes"] = 12 * a.numel()
    row["seconds"], row["baseline_seconds"] = device.take_turns(lambda: library.solve_diagonal(a, b), theirs)


class Results:
    def __init__(self, path, device):
        gpu = torch.cuda.get_device_name() if device.name != "cpu" else "none"
        self.path, self.failed = path, False
        self.all = {"part": "torch", "gpu": gpu, "torch": torch.__version__, "rows": []}
        if device.tiny or device.name == "cpu":
            self.all["tiny"] = True

    def add(self, row, measure, *arguments):
        try:
            with torch.no_grad():
                measure(*arguments, row)
            row["ratio"] = row["baseline_seconds"]["median"] / row["seconds"]["median"]
        except NotRun as reason:
            row["not_run"] = str(reason)
        except torch.cuda.OutOfMemoryError as error:
            row["not_run"] = str(error)
        except Exception as error:  # pylint: disable=broad-except
            row["failed"] = f"{type(error).__name__}: {error}"
            self.failed = True
        self.all["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.path:
            with open(self.path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(self.all, file, indent=1)
            os.replace(self.path + ".tmp", self.path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libdeeppcr_gpu.so")
    parser.add_argument("--nn", help="libdeeppcr_nn.so for this torch: ParaGRU then runs as torch.ops.deeppcr.para_gru")
    parser.add_argument("--built-with", help="the torch that it is for: with another one nothing runs (exit code 77)")
    parser.add_argument("--pararnn", help="a checkout of ParaRNN with its extension built in place")
    parser.add_argument("--json", help="the file to write")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that all works, and nothing else")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    if options.built_with and torch.__version__.split(".")[:2] != options.built_with.split(".")[:2]:
        print(f"skipped: torch {torch.__version__}, built with {options.built_with}")
        return 77
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("compare_torch.py: torch sees no GPU here")
    if not (options.library or options.nn):
        parser.error("--library or --nn is needed")
    device = Device(options.device, options.tiny)
    library = Library(options.library) if options.library else None
    ours = Operators(options.nn) if options.nn else library
    how = "torch.ops.deeppcr" if options.nn else "libdeeppcr_gpu.so"
    results = Results(options.json, device)

    results.add({"target": "lstm", "what": f"ParaGRU forward with its projection ({how})",
                 "baseline": "torch's LSTM (cuDNN): a different cell"}, measure_lstm, device, ours)
    shapes = [(20, 2, 6)] if options.tiny else [(512, 16, 768), (1024, 16, 768), (4096, 8, 768), (16384, 8, 512)]
    for dtype in [torch.float32] if options.device == "cpu" else [torch.float32, torch.bfloat16]:
        for steps, batch, width in shapes:
            for host_ahead, when in [(True, "the host ahead"), (False, "a call alone")][0 if options.nn else 1:]:
                results.add({"target": "pararnn-1024" if steps <= 1024 else "pararnn",
                             "what": f"ParaGRU forward ({how}), {when}", "baseline": "Apple's fused kernel"},
                            measure_pararnn, device, ours, options.pararnn, dtype, steps, batch, width, host_ahead)
    for name, make in [("Triton", scan_by_triton), ("JAX", scan_by_jax)]:
        results.add({"what": "explicit diagonal", "baseline": f"associative_scan of {name}"},
                    measure_scan, device, library, make)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
