"""torch.ops.deeppcr.* on a GPU: against processors, in streams of its own, under autocast, on packed sequences.

Called with the path of libdeeppcr_nn.so and the version of the LibTorch that it was linked with; exits with 77 (ctest:
skipped) where this Python has no torch, another one, or no GPU. It is what `benchmarks/gpu.sh run nn` runs.
"""
import gc
import sys
import time

try:
    import torch
except ImportError:
    print("skipped: this Python has no torch")
    sys.exit(77)
if torch.__version__.split(".")[:2] != sys.argv[2].split(".")[:2]:
    print(f"skipped: torch {torch.__version__}, built with LibTorch {sys.argv[2]}")
    sys.exit(77)
torch.ops.load_library(sys.argv[1])
if not torch.cuda.is_available():
    print(f"skipped: torch {torch.__version__} has no GPU to use")
    sys.exit(77)

ops = torch.ops.deeppcr
cells = {"para_gru": (1, 3, 3), "para_lstm": (2, 3, 5), "diagonal_elman": (1, 1, 1), "slstm": (4, 4, 4)}
failures = []


def check(what, good, details=""):
    print(("ok      " if good else "FAILED  ") + what + (f" ({details})" if details else ""), flush=True)
    if not good:
        failures.append(what)


def distance(a, b):
    """The largest difference as a fraction of b's largest number; infinite for other shapes, types, or NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    apart = (a.detach().cpu().double() - b.detach().cpu().double()).abs().max() / (b.abs().max().cpu().double() + 1e-30)
    return float(apart) if torch.isfinite(apart) else float("inf")


def compare(what, operation, arguments, tolerance):
    """Values and gradients of operation(*arguments), on the GPU and on the processor."""
    found = {}
    for device in ("cpu", "cuda"):
        there = [a.to(device).detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        result = operation(*there)
        weights = torch.linspace(-1, 1, result.numel(), dtype=torch.double).view(result.shape).to(result)
        tensors = [a for a in there if isinstance(a, torch.Tensor)]
        gradients = torch.autograd.grad((result * weights).sum(), tensors)
        found[device] = [result, *gradients]
    check(what + ": on the GPU", all(tensor.is_cuda for tensor in found["cuda"]))
    apart = [distance(a, b) for a, b in zip(found["cuda"], found["cpu"])]
    check(what + ": values and gradients", max(apart) <= tolerance, ", ".join(f"{value:.1e}" for value in apart))


def cell_arguments(name, steps, batch, channels, dtype, seed=1):
    states, inputs, count = cells[name]
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double)
    return [draw(steps, batch, inputs * channels).to(dtype), (draw(count, channels) / 2).to(dtype),
            draw(batch, states * channels).abs().to(dtype)]


# Every cell, in both types and directions: few steps, a multiple of nothing, and so many that they are cut.
for name in cells:
    for dtype, tolerance in ((torch.float, 2e-4), (torch.double, 1e-10)):
        for steps, batch, channels in ((1, 1, 1), (37, 3, 33), (3000, 2, 5)):
            for reverse in (False, True):
                compare(f"{name} {dtype} [{steps},{batch},{channels}]{' reversed' if reverse else ''}",
                        lambda *a, op=getattr(ops, name), r=reverse: op(*a, r),
                        cell_arguments(name, steps, batch, channels, dtype), tolerance)

# Numbers of 16 bits, with parameters as floats: as the processor, which widens them.
for dtype in (torch.bfloat16, torch.float16):
    for name in ("para_gru", "para_lstm"):
        gates, parameters, initial = cell_arguments(name, 200, 3, 16, torch.float)
        compare(f"{name} {dtype}", getattr(ops, name), [gates.to(dtype), parameters, initial.to(dtype)], 0.05)

# The dense ones.
for dtype, tolerance in ((torch.float, 1e-3), (torch.double, 1e-10)):
    for kind, gates, width in (("elman_tanh", 1, 1), ("gru", 3, 1), ("lstm", 4, 2)):
        for method in ("sequential", "newton"):
            hidden, generator = 8, torch.Generator().manual_seed(2)
            draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)
            compare(f"dense_cell {kind} {method} {dtype}",
                    lambda *a, k=kind, m=method: ops.dense_cell(k, *a, m),
                    [draw(50, 3, gates * hidden), draw(gates * hidden, hidden) / 4, draw(gates * hidden) / 4,
                     draw(3, width * hidden)], tolerance)
    for skip in (0, 1, 2):
        for method in ("sequential", "newton"):
            width, generator = 16, torch.Generator().manual_seed(3)
            draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)
            compare(f"dense_chain skip {skip} {method} {dtype}",
                    lambda *a, s=skip, m=method: ops.dense_chain(*a, "tanh", s, m, True),
                    [draw(5, width), draw(40, width, width) / 8, draw(40, width) / 4], tolerance)

# Whole layers: heads, layers, directions; packed sequences of different lengths.
torch.manual_seed(4)
inputs, hidden, heads, layers = 6, 8, 2, []
for layer in range(2):
    for direction in range(2):
        width = (inputs if layer == 0 else 2 * hidden) // heads
        layers += [torch.randn(3 * hidden, width) / 2, torch.randn(3 * hidden) / 2, torch.randn(3, hidden) / 2]
rows = torch.randn(3, 50, inputs)
compare("recurrent", lambda x, *w: ops.recurrent("para_gru", x, list(w), bidirectional=True)[0], [rows, *layers], 2e-4)
compare("recurrent: last", lambda x, *w: ops.recurrent("para_gru", x, list(w), bidirectional=True)[1], [rows, *layers],
        2e-4)
packed = torch.nn.utils.rnn.pack_sequence([torch.randn(length, inputs) for length in (300, 7, 1)])
for part in (0, 1):
    compare(f"recurrent: packed, part {part}",
            lambda x, *w: ops.recurrent("para_gru", x, list(w), None, packed.batch_sizes, True)[part],
            [packed.data, *layers], 2e-4)

# Autocast: gates and states of 16 bits, parameters and their gradients as floats.
for dtype in (torch.bfloat16, torch.float16):
    there = [tensor.cuda().requires_grad_() for tensor in layers]
    with torch.autocast("cuda", dtype):
        output, last = ops.recurrent("para_gru", rows.cuda(), there, bidirectional=True)
        gates, parameters, initial = (a.cuda().requires_grad_() for a in cell_arguments("para_gru", 50, 2, 8, torch.float))
        states = ops.para_gru(gates, parameters, initial)
        chain = ops.dense_chain(torch.randn(3, 4).cuda().to(dtype), torch.randn(5, 4, 4).cuda() / 4,
                                torch.zeros(5, 4).cuda())
    exact = ops.recurrent("para_gru", rows, layers, bidirectional=True)[0]
    check(f"autocast {dtype}: types",
          output.dtype == last.dtype == states.dtype == dtype and chain.dtype == torch.float)
    check(f"autocast {dtype}: values", distance(output.float(), exact) < 0.1, f"{distance(output.float(), exact):.1e}")
    gradients = torch.autograd.grad(output.float().square().sum(), there) + torch.autograd.grad(
        states.float().sum(), (gates, parameters, initial))
    check(f"autocast {dtype}: gradients are floats",
          all(g.dtype == torch.float and bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0 for g in gradients))

# Nothing waits: the host is back while the GPU still sleeps, forward and backward.
gates, parameters, initial = (a.cuda().requires_grad_() for a in cell_arguments("para_gru", 2000, 4, 32, torch.float))
for _ in range(12):  # until it is known what the methods take
    ops.para_gru(gates, parameters, initial).sum().backward()
expected = gates.grad.clone() / 12
gates.grad = None
torch.cuda.synchronize()
torch.cuda._sleep(2_000_000_000)
begin = time.perf_counter()
ops.para_gru(gates, parameters, initial).sum().backward()
seconds = time.perf_counter() - begin
torch.cuda.synchronize()
check("the host does not wait", seconds < 0.2, f"{seconds:.3f} s")
check("what is not waited for", distance(gates.grad, expected) < 1e-4, f"{distance(gates.grad, expected):.1e}")

# A CUDA graph of an evaluation, replayed with other inputs.
with torch.no_grad():
    fixed, stream = gates.detach().clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.para_gru(fixed, parameters, initial)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.para_gru(fixed, parameters, initial)
    for scale in (0.5, 1.0):
        fixed.copy_(gates * scale)
        graph.replay()
        apart = distance(captured, ops.para_gru(gates * scale, parameters, initial))
        check(f"a graph of a cell, inputs times {scale}", apart < 1e-4, f"{apart:.1e}")

# What is not finite has no gradient.
broken = gates.detach().clone()
broken[100, 1, 3] = float("nan")
broken.requires_grad_()
states = ops.para_gru(broken, parameters, initial)
gradients = torch.autograd.grad(states.sum(), (broken, parameters, initial))
check("what is not finite has gradients of NaN", all(bool(g.isnan().all()) for g in gradients))

# A stream of its own: what it waits for is late, so that work in any other stream would read zeros.
gates, parameters, initial = (a.cuda() for a in cell_arguments("para_lstm", 2000, 4, 32, torch.float))
expected = ops.para_lstm(gates, parameters, initial)
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    for repetition in range(20):
        late = torch.zeros_like(gates)
        torch.cuda._sleep(20_000_000)
        late.copy_(gates)
        late.requires_grad_()
        states = ops.para_lstm(late, parameters, initial)
        states.sum().backward()
        if repetition == 0:
            first = late.grad
        del states
    same = torch.equal(late.grad, first)
    again = ops.para_lstm(late, parameters, initial)
torch.cuda.current_stream().wait_stream(stream)
check("a stream of its own", torch.equal(again, expected))
check("a stream of its own: gradients repeat", same)

# Memory is torch's: after some calls nothing is left over, and what is free is used again.
del late, again, first
gc.collect()
torch.cuda.synchronize()
before = torch.cuda.memory_allocated()
for repetition in range(3):
    gates.requires_grad_()
    ops.para_lstm(gates, parameters, initial).sum().backward()
    gates.grad = None
    reserved = torch.cuda.memory_reserved()
gc.collect()
check("memory goes back to torch", torch.cuda.memory_allocated() == before)
gates.requires_grad_(False)
ops.para_lstm(gates, parameters, initial)
check("memory is used again", torch.cuda.memory_reserved() == reserved)

# The tensors' device counts, not the current one.
if torch.cuda.device_count() > 1:
    with torch.cuda.device(0):
        there = [a.to("cuda:1") for a in (gates, parameters, initial)]
        states = ops.para_lstm(*there)
    check("another device", states.device == torch.device("cuda:1") and distance(states, expected) == 0
          and torch.cuda.current_device() == 0)
else:
    print("skipped another device: there is one GPU")

# Training: the loss falls, and each step updates what the processor's does.
losses = {}
for device in ("cpu", "cuda"):
    torch.manual_seed(5)
    weights = [(torch.randn(3 * hidden, inputs) / 3), torch.zeros(3 * hidden), torch.randn(3, hidden) / 2]
    weights = [w.to(device).requires_grad_() for w in weights]
    data, optimiser = torch.randn(16, 200, inputs).to(device), torch.optim.Adam(weights, 0.02)
    target, losses[device] = data.cumsum(1)[..., :1].tanh(), []
    for step in range(20):
        optimiser.zero_grad()
        loss = (ops.recurrent("para_gru", data, weights)[0].mean(-1, keepdim=True) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses[device].append(float(loss))
check("training", losses["cuda"][-1] < losses["cuda"][0] and
      max(abs(a - b) for a, b in zip(losses["cpu"], losses["cuda"])) < 1e-3,
      f"{losses['cuda'][0]:.4f} to {losses['cuda'][-1]:.4f}")

# Errors name the argument and leave everything usable.
for call, name in ((lambda: ops.para_gru(gates, parameters.cpu()), "parameters"),
                   (lambda: ops.dense_chain(torch.randn(2, 3).cuda(), torch.randn(4, 3, 3), torch.zeros(4, 3)),
                    "weights")):
    try:
        call()
    except RuntimeError as error:
        check(f"tensors on two devices: {name}", name in str(error))
    else:
        check(f"tensors on two devices: {name}", False, "no error")

print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: " +
      (f"{len(failures)} FAILED" if failures else "all as expected"))
sys.exit(1 if failures else 0)
