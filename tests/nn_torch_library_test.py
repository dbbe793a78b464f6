"""torch.ops.deeppcr.* from Python: states against a plain loop, gradients against finite differences, autocast.

Called with the path of libdeeppcr_nn.so and the version of the LibTorch that it was linked with; exits with 77 (ctest:
skipped) where this Python has no torch, or another one.
"""
import sys
from typing import List, Optional

try:
    import torch
except ImportError:
    print("skipped: this Python has no torch")
    sys.exit(77)
if torch.__version__.split(".")[:2] != sys.argv[2].split(".")[:2]:
    print(f"skipped: torch {torch.__version__}, built with LibTorch {sys.argv[2]}")
    sys.exit(77)

torch.ops.load_library(sys.argv[1])
torch.manual_seed(1)


def para_gru(h, u, p):
    z, r = torch.sigmoid(p[0] * h + u[0]), torch.sigmoid(p[1] * h + u[1])
    return (1 - z) * h + z * torch.tanh(p[2] * (r * h) + u[2])


steps, batch, channels = 12, 3, 5
gates = torch.randn(steps, batch, 3 * channels, dtype=torch.double, requires_grad=True)
parameters = torch.randn(3, channels, dtype=torch.double, requires_grad=True)
initial = torch.randn(batch, channels, dtype=torch.double, requires_grad=True)

states = torch.ops.deeppcr.para_gru(gates, parameters, initial)
h, expected = initial, []
for t in range(steps):
    h = para_gru(h, gates[t].chunk(3, -1), parameters)
    expected.append(h)
expected = torch.stack(expected)
assert torch.allclose(states, expected, atol=1e-12), (states - expected).abs().max()

weights = torch.randn_like(states)
ours = torch.autograd.grad((states * weights).sum(), (gates, parameters, initial))
theirs = torch.autograd.grad((expected * weights).sum(), (gates, parameters, initial))
for a, b in zip(ours, theirs):
    assert torch.allclose(a, b, atol=1e-11), (a - b).abs().max()

for operation, kinds in ((torch.ops.deeppcr.para_lstm, (2, 3, 5)), (torch.ops.deeppcr.diagonal_elman, (1, 1, 1)),
                         (torch.ops.deeppcr.slstm, (4, 4, 4))):
    for backwards in (False, True):
        state, inputs, count = kinds
        u = torch.randn(6, 2, inputs * 3, dtype=torch.double, requires_grad=True)
        p = (torch.randn(count, 3, dtype=torch.double) / 2).requires_grad_()
        x = torch.rand(2, 3 * state, dtype=torch.double).requires_grad_()
        assert torch.autograd.gradcheck(lambda *values: operation(*values, backwards), (u, p, x))

# Batch first, without a copy: the same numbers.
rows = gates.detach().transpose(0, 1).contiguous()
assert torch.equal(torch.ops.deeppcr.para_gru(rows.transpose(0, 1), parameters, initial), states)

# A GRU layer of torch's.
gru = torch.nn.GRU(4, 6).double()
x = torch.randn(9, 2, 4, dtype=torch.double)
projected = x @ gru.weight_ih_l0.T + gru.bias_ih_l0
ours = torch.ops.deeppcr.dense_cell("gru", projected, gru.weight_hh_l0, gru.bias_hh_l0,
                                    torch.zeros(2, 6, dtype=torch.double))
assert torch.allclose(ours, gru(x)[0], atol=1e-12)

newton = torch.ops.deeppcr.dense_cell("gru", projected, gru.weight_hh_l0, gru.bias_hh_l0,
                                      torch.zeros(2, 6, dtype=torch.double), "newton")
assert torch.allclose(newton, ours, atol=1e-12)

# A chain of layers.
x0 = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
weights = (torch.randn(7, 4, 4, dtype=torch.double) / 2).requires_grad_()
biases = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
for method in ("newton", "sequential"):
    expected = x0
    for w, b in zip(weights, biases):
        expected = expected + torch.tanh(expected @ w.T + b)
    ours = torch.ops.deeppcr.dense_chain(x0, weights, biases, "tanh", 1, method)
    assert torch.allclose(ours, expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *values: torch.ops.deeppcr.dense_chain(*values, "tanh", 1, method),
                                    (x0, weights, biases))

# Whole layers: two of them, both directions, two heads, packed; a script may call them.
inputs, hidden, heads = 4, 6, 2
layers = []
for layer in range(2):
    for direction in range(2):
        width = (inputs if layer == 0 else 2 * hidden) // heads
        layers += [torch.randn(3 * hidden, width, dtype=torch.double), torch.randn(3 * hidden, dtype=torch.double),
                   torch.randn(3, hidden, dtype=torch.double) / 2]
layers = [tensor.requires_grad_() for tensor in layers]


@torch.jit.script
def scripted(x: torch.Tensor, weights: List[torch.Tensor], sizes: Optional[torch.Tensor]):
    return torch.ops.deeppcr.recurrent("para_gru", x, weights, None, sizes, True)


def plain(x):
    """One sequence [steps,inputs] through all layers, by their equations."""
    last = []
    for layer in range(2):
        outputs = []
        for direction in range(2):
            w, b, p = layers[(layer * 2 + direction) * 3:][:3]
            full = torch.zeros(3, hidden, x.shape[1], dtype=torch.double)
            for head in range(heads):
                rows = slice(head * hidden // heads, (head + 1) * hidden // heads)
                columns = slice(head * x.shape[1] // heads, (head + 1) * x.shape[1] // heads)
                full[:, rows, columns] = w.view(3, hidden, -1)[:, rows]
            u = (x if direction == 0 else x.flip(0)) @ full.view(3 * hidden, -1).T + b
            h, rows = torch.zeros(hidden, dtype=torch.double), []
            for t in range(x.shape[0]):
                h = para_gru(h, u[t].chunk(3, -1), p)
                rows.append(h)
            outputs.append(torch.stack(rows) if direction == 0 else torch.stack(rows).flip(0))
            last.append(h)
        x = torch.cat(outputs, 1)
    return x, torch.stack(last)


sequences = [torch.randn(length, inputs, dtype=torch.double, requires_grad=True) for length in (7, 1, 4)]
packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
output, last = scripted(packed.data, layers, packed.batch_sizes)
output = torch.nn.utils.rnn.PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
output, lengths = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
last = last[:, packed.unsorted_indices]
loss = ours = 0
for j, sequence in enumerate(sequences):
    expected, end = plain(sequence)
    assert torch.allclose(output[j, :lengths[j]], expected, atol=1e-11)
    assert torch.allclose(last[:, j], end, atol=1e-11)
    alone = torch.ops.deeppcr.recurrent("para_gru", sequence[None], layers, bidirectional=True)
    assert torch.allclose(alone[0][0], expected, atol=1e-11) and torch.allclose(alone[1][:, 0], end, atol=1e-11)
    loss, ours = loss + (expected**2).sum() + end.sum(), ours + (output[j, :lengths[j]]**2).sum() + last[:, j].sum()
for a, b in zip(torch.autograd.grad(ours, layers + sequences), torch.autograd.grad(loss, layers + sequences)):
    assert torch.allclose(a, b, atol=1e-9), (a - b).abs().max()

# Under autocast on processors: projections of 16 bits; cells and what is dense stay float, and double stays double.
single = [tensor.detach().float().requires_grad_() for tensor in layers]
rows = torch.randn(2, 9, inputs)
exact, _ = torch.ops.deeppcr.recurrent("para_gru", rows, single, bidirectional=True)
with torch.autocast("cpu", torch.bfloat16):
    coarse, end = torch.ops.deeppcr.recurrent("para_gru", rows, single, torch.zeros(4, 2, hidden), bidirectional=True)
    again, _ = torch.ops.deeppcr.recurrent("para_gru", rows.bfloat16(), single, bidirectional=True)
    states = torch.ops.deeppcr.para_gru(gates.detach().bfloat16(), parameters.detach().bfloat16())
    assert torch.ops.deeppcr.para_gru(gates, parameters, initial).dtype == torch.double
    chain = torch.ops.deeppcr.dense_chain(x0.bfloat16(), weights.float(), biases.float(), "tanh", 1)
    dense = torch.ops.deeppcr.dense_cell("gru", projected.bfloat16(), gru.weight_hh_l0.float(),
                                         gru.bias_hh_l0.float(), torch.zeros(2, 6))
assert coarse.dtype == end.dtype == again.dtype == torch.bfloat16
assert states.dtype == chain.dtype == dense.dtype == torch.float
assert torch.allclose(coarse.float(), exact, atol=0.1) and torch.allclose(again.float(), exact, atol=0.1)
for gradient, tensor in zip(torch.autograd.grad(coarse.float().square().sum(), single), single):
    assert gradient.dtype == torch.float and gradient.abs().max() > 0, tensor.shape
try:
    torch.ops.deeppcr.recurrent("para_gru", rows.bfloat16(), single, bidirectional=True)
except RuntimeError as error:
    assert "weights[0]" in str(error), error
else:
    raise AssertionError("mixed types without autocast")

# Shapes alone, and torch.compile, where there is one: a network with cells in it is traced, forward and backward.
assert torch.ops.deeppcr.para_lstm(gates.to("meta"), torch.empty(5, channels, dtype=torch.double, device="meta")
                                   ).shape == (steps, batch, 2 * channels)
if hasattr(torch, "compile"):
    for start in (initial, None):
        torch.library.opcheck(torch.ops.deeppcr._cell.default, (0, gates, parameters, start, True))

    def network(u, p, x):
        return torch.ops.deeppcr.para_gru(u.tanh(), p, x, True).square().sum()

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for length in (steps, 5, 7):
        ours = torch.autograd.grad(compiled(gates[:length], parameters, initial), (gates, parameters, initial))
        theirs = torch.autograd.grad(network(gates[:length], parameters, initial), (gates, parameters, initial))
        for a, b in zip(ours, theirs):
            assert torch.allclose(a, b, atol=1e-12), (a - b).abs().max()

for call in (lambda: torch.ops.deeppcr.para_gru(gates, parameters[:2]),
             lambda: torch.ops.deeppcr.dense_chain(x0, weights, biases, "no such activation"),
             lambda: torch.ops.deeppcr.recurrent("no such cell", x, layers),
             lambda: torch.ops.deeppcr.recurrent("slstm", x, layers),
             lambda: torch.ops.deeppcr.dense_cell("no such cell", projected, gru.weight_hh_l0, gru.bias_hh_l0, x[0])):
    try:
        call()
    except RuntimeError as error:
        assert any(name in str(error) for name in ("parameters", "kind", "cell", "weights", "activation")), error
    else:
        raise AssertionError("no error")
print("torch.ops.deeppcr: all as expected")
