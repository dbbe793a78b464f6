"""DIAGONAL AGAINST DENSE CELL on a GPU: torch.ops.deeppcr.recurrent("para_gru" | "para_lstm") against torch.nn.LSTM (cuDNN)
of as many inputs and hidden units, one layer, forward and forward + backward. They compute different networks: ours have
diagonal recurrent weights, theirs full ones. Both include the projection of the inputs; `cell` is ours without it.

    nn_benchmark.py libdeeppcr_nn.so [--json FILE] [--quick]

First each layer's states are compared with a loop over its equations. Then all take turns; medians over the rounds are
compared, with the spread between the first and the third quarter. Markdown goes to standard output.
"""
import argparse
import json
import statistics
import sys

import torch

arguments = argparse.ArgumentParser()
arguments.add_argument("library")
arguments.add_argument("--json")
arguments.add_argument("--quick", action="store_true", help="a few small sizes: does it work?")
arguments = arguments.parse_args()
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} has no GPU to use: there is nothing to measure")
torch.ops.load_library(arguments.library)
ops = torch.ops.deeppcr
parameter_count = {"para_gru": 3, "para_lstm": 5}
state_count = {"para_gru": 1, "para_lstm": 2}


def para_gru(x, u, p):
    (h,) = x
    z, r = torch.sigmoid(p[0] * h + u[0]), torch.sigmoid(p[1] * h + u[1])
    return (h + z * (torch.tanh(p[2] * (r * h) + u[2]) - h),)


def para_lstm(x, u, p):
    c, h = x
    f, n = torch.sigmoid(p[0] * h + p[3] * c + u[0]), torch.tanh(p[2] * h + u[2])
    c = n + f * (c - n)
    return c, torch.sigmoid(p[1] * h + p[4] * c + u[1]) * torch.tanh(c)


def verify(cell, gates, parameters, states):
    """The difference from a loop in double, as a fraction of 1: states lie within +-1 or are about as large."""
    values = state_count[cell]
    step, p = {"para_gru": para_gru, "para_lstm": para_lstm}[cell], parameters.double()
    x = tuple(torch.zeros_like(gates[0, :, :parameters.shape[1]], dtype=torch.double) for _ in range(values))
    largest = 0.0
    for t in range(gates.shape[0]):
        x = step(x, gates[t].double().chunk(3, -1), p)
        found = states[t].double().view(states.shape[1], -1, values)
        largest = max(largest, float((found - torch.stack(x, -1)).abs().max()))
    return largest


def milliseconds(function):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(competitors, rounds):
    for function in competitors.values():
        for _ in range(3):
            function()
    times = {name: [] for name in competitors}
    for done in range(rounds):
        if done >= 5 and sum(map(sum, times.values())) > 1500:
            break
        for name, function in competitors.items():
            times[name].append(milliseconds(function))
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median_ms": median, "quartiles_ms": [low, high]}
    return result


def run(cell, batch, hidden, steps, dtype, rounds):
    torch.manual_seed(1)
    x = torch.randn(batch, steps, hidden, device="cuda", dtype=dtype, requires_grad=True)
    weights = [torch.randn(3 * hidden, hidden, device="cuda") / hidden**0.5, torch.zeros(3 * hidden, device="cuda"),
               torch.randn(parameter_count[cell], hidden, device="cuda") / 2]
    weights = [w.to(dtype).requires_grad_() for w in weights]
    gates = torch.nn.functional.linear(x, weights[0], weights[1]).detach().transpose(0, 1)
    parameters = weights[2].detach().float() if dtype != torch.float else weights[2].detach()
    lstm = torch.nn.LSTM(hidden, hidden, batch_first=True, device="cuda", dtype=dtype)
    operation = getattr(ops, cell)

    short = gates[:200]
    error = verify(cell, short, parameters, operation(short, parameters))
    allowed = {torch.float: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    if not error <= allowed:
        sys.exit(f"{cell} {dtype}: states differ by {error} from their equations, more than {allowed}")

    def backward(output):
        output.sum().backward()

    with torch.no_grad():
        forward = measure({"cell": lambda: operation(gates, parameters),
                           "layer": lambda: ops.recurrent(cell, x, weights),
                           "lstm": lambda: lstm(x)}, rounds)
    both = measure({"layer": lambda: backward(ops.recurrent(cell, x, weights)[0]),
                    "lstm": lambda: backward(lstm(x)[0])}, rounds)
    return {"cell": cell, "batch": batch, "hidden": hidden, "steps": steps, "dtype": str(dtype).split(".")[1],
            "difference": error, "forward": forward, "forward_backward": both}


shapes = [(2, 32, 64)] if arguments.quick else [(16, 768, 1024), (16, 768, 8192), (1, 768, 16384), (64, 1024, 1024)]
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}. Milliseconds, "
      "medians; the ratio is cuDNN's LSTM, a different cell, to our layer.\n")
print("| cell | type | batch | hidden | steps | cell | layer | cuDNN LSTM | ratio | layer, with backward | cuDNN | ratio |")
print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
results = []
for shape in shapes:
    for cell in parameter_count:
        for dtype in (torch.float, torch.bfloat16):
            r = run(cell, *shape, dtype, 5 if arguments.quick else 20)
            results.append(r)
            f, b = ({name: entry["median_ms"] for name, entry in r[key].items()} for key in ("forward", "forward_backward"))
            print(f"| {r['cell']} | {r['dtype']} | {r['batch']} | {r['hidden']} | {r['steps']} | {f['cell']:.3f} "
                  f"| {f['layer']:.3f} | {f['lstm']:.3f} | {f['lstm'] / f['layer']:.1f} | {b['layer']:.3f} "
                  f"| {b['lstm']:.3f} | {b['lstm'] / b['layer']:.1f} |", flush=True)
            if arguments.json:  # what is measured stays, should the next size take too long
                with open(arguments.json, "w") as file:
                    json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                               "cudnn": torch.backends.cudnn.version(), "command": sys.argv, "results": results}, file,
                              indent=1)
