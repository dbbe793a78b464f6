"""torch.classes.deeppcr.Sampling: its samplers step after step against the schedulers of Hugging Face's diffusers, where
this Python has them, and in parallel against step after step.

Called with the path of libdeeppcr_nn.so and the version of the LibTorch that it was linked with; exits with 77 (ctest:
skipped) where this Python has no torch, or another one.
"""
import os
import sys
import tempfile

try:
    import torch
except ImportError:
    print("skipped: this Python has no torch")
    sys.exit(77)
if torch.__version__.split(".")[:2] != sys.argv[2].split(".")[:2]:
    print(f"skipped: torch {torch.__version__}, built with LibTorch {sys.argv[2]}")
    sys.exit(77)
torch.ops.load_library(sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
numbers, images = 6, 3


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Linear(numbers, 16), torch.nn.Linear(16, numbers)

    def forward(self, x, t):
        return self.second(torch.tanh(self.first(x) + (t / 500)[:, None]))


network = Denoiser().to(device)
folder = tempfile.TemporaryDirectory()
file = os.path.join(folder.name, "denoiser.pt")
torch.jit.script(network).save(file)
names = {"noise": "epsilon", "velocity": "v_prediction", "sample": "sample"}


def sampling(sampler, steps, spacing, prediction, schedule, method="sequential", surrogate="full", passes=0, eta=0.0,
             tolerance=1e-5):
    return torch.classes.deeppcr.Sampling(file, [numbers], images, sampler, steps, spacing, eta, prediction, schedule,
                                          1000, method, surrogate, tolerance, passes, device)


def noise(steps):
    generator = torch.Generator().manual_seed(steps)
    return (torch.randn(images, numbers, generator=generator).to(device),
            torch.randn(steps, images, numbers, generator=generator).to(device))


def visited(spacing, steps):
    """The times of a generation; see Spacing."""
    if spacing == "leading":
        return [(steps - 1 - i) * (1000 // steps) for i in range(steps)]
    if spacing == "trailing":
        return [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    return [round(999 - i * 999 / (steps - 1)) for i in range(steps)]


class StepTo:
    """What scheduling_ddim divides the number of times by, to step back by as much: so it steps to the next time that
    is visited, also where the times are not that far apart."""

    def __init__(self, distance):
        self.distance = distance

    def __rfloordiv__(self, _):
        return self.distance


def by_diffusers(sampler, steps, spacing, prediction, schedule, eta):
    """The last state of the scheduler's own steps from time to time, in double, or None where it has no such prediction.
    Which times a spacing means differs between the schedulers of diffusers: these are the samplers' rules alone."""
    import diffusers
    import diffusers.schedulers.scheduling_ddim
    import diffusers.schedulers.scheduling_ddpm
    common = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type=names[prediction],
                  beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule])
    times, (initial, random) = visited(spacing, steps), noise(steps)
    left = list(random.double())
    draw = lambda *_, **__: left.pop(0)
    more = {}
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(**common, clip_sample=False)
        scheduler.previous_timestep = lambda time: (times + [-1])[times.index(int(time)) + 1]
        diffusers.schedulers.scheduling_ddpm.randn_tensor = draw
    elif sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False)
        diffusers.schedulers.scheduling_ddim.randn_tensor = draw
        more = dict(eta=eta)
    elif sampler.startswith("dpm_solver"):
        scheduler = diffusers.DPMSolverMultistepScheduler(**common, solver_order=int(sampler[-1]), euler_at_final=True)
    elif sampler == "euler":
        scheduler = diffusers.EulerDiscreteScheduler(**common)
    elif prediction == "sample":
        return None
    else:
        scheduler = diffusers.HeunDiscreteScheduler(**common)
    scheduler.set_timesteps(steps, device=device)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    kept = scheduler.alphas_cumprod[times]
    sigmas = torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.double)])
    scheduler.timesteps = torch.tensor(times, dtype=torch.double if sampler == "euler" else torch.long)
    scheduler.sigmas = sigmas
    if sampler == "heun":  # each step twice, but the last
        twice = [i for i in range(steps) for _ in range(2)][1:]
        scheduler.timesteps = torch.tensor([float(times[i]) for i in twice], dtype=torch.double)
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    exact = network_of_doubles()
    x = initial.double()
    if sampler in ("euler", "heun"):
        x = x * (sigmas[0] ** 2 + 1) ** 0.5
    for i, time in enumerate(scheduler.timesteps):
        if sampler == "ddim":
            scheduler.num_inference_steps = StepTo(times[i] - (times + [-1])[i + 1])
        inputs = scheduler.scale_model_input(x, time)
        with torch.no_grad():
            output = exact(inputs, torch.full((images,), float(time), dtype=torch.double, device=device))
        x = scheduler.step(output, time, x, **more).prev_sample
    return x.float()


def network_of_doubles():
    import copy
    return copy.deepcopy(network).double()


def distance(a, b):
    apart = (a - b).abs().max() / (1 + b.abs().max())
    return float(apart) if torch.isfinite(apart) else float("inf")


# In parallel, and where the device is a GPU also captured in a graph.
for sampler in ("ddpm", "ddim", "dpm_solver_1", "dpm_solver_2", "euler", "heun"):
    initial, random = noise(100)
    found = {}
    for method, surrogate in (("sequential", "full"), ("newton", "full"), ("newton", "diagonal")):
        samples = sampling(sampler, 100, "trailing", "noise", "linear", method, surrogate)
        samples.draw(initial, random if sampler == "ddpm" else None, None)
        found[method, surrogate] = samples.sample()
        assert samples.ok(), samples.report()
        assert found[method, surrogate].shape == (images, numbers)
        if surrogate == "full" and method == "newton":
            assert samples.iterations() < 30, samples.report()
    for result in found.values():
        assert distance(result, found["sequential", "full"]) < 1e-3, sampler
    if device == "cuda":
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            samples = sampling(sampler, 100, "trailing", "noise", "linear", "newton", "full", 20)
            samples.enqueue()
            samples.finish()
        with torch.cuda.graph(graph, stream=stream):
            samples.enqueue()
        samples.draw(initial, random if sampler == "ddpm" else None, None)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
            replayed = samples.finish()
        torch.cuda.synchronize()
        assert samples.ok(), samples.report()
        assert distance(replayed, found["sequential", "full"]) < 1e-3, sampler
    print("ok      in parallel:", sampler)

for arguments, name in ((("ddin", 10, "trailing", "noise", "linear"), "sampler"),
                        (("ddim", 0, "trailing", "noise", "linear"), "steps")):
    try:
        sampling(*arguments)
    except RuntimeError as error:
        assert name in str(error), error
    else:
        sys.exit(f"no error for a wrong {name}")
try:
    sampling("ddim", 10, "trailing", "noise", "linear").sample()
except RuntimeError as error:
    assert "draw" in str(error), error
else:
    sys.exit("no error for noise that is missing")
try:
    sampling("ddim", 10, "trailing", "noise", "linear").draw(torch.zeros(images, numbers + 1, device=device), None, None)
except RuntimeError as error:
    assert "initial_noise" in str(error), error
else:
    sys.exit("no error for a wrong initial_noise")

try:
    import diffusers
except ImportError:
    print("this Python has no diffusers: nothing to compare the samplers with")
    sys.exit(0)
compared, worst, missing = 0, 0.0, 0
for sampler in ("ddpm", "ddim", "dpm_solver_1", "dpm_solver_2", "euler", "heun"):
    for spacing in ("leading", "trailing", "linspace"):
        for prediction in names:
            for schedule in ("linear", "cosine"):
                for eta in (0.0, 0.5, 1.0) if sampler == "ddim" else (0.0,):
                    for steps in (10, 50):
                        theirs = by_diffusers(sampler, steps, spacing, prediction, schedule, eta)
                        if theirs is None:
                            missing += 1
                            continue
                        initial, random = noise(steps)
                        samples = sampling(sampler, steps, spacing, prediction, schedule, eta=eta)
                        samples.draw(initial, random if sampler == "ddpm" or eta > 0 else None, None)
                        apart = distance(samples.sample(), theirs)
                        compared, worst = compared + 1, max(worst, apart)
                        print(f"{'ok     ' if apart < 1e-3 else 'DIFFERS'} {sampler}, {steps} steps, {spacing}, "
                              f"{prediction}, {schedule}, eta {eta}: {apart:.1e}")
print(f"diffusers {diffusers.__version__}: {compared} samplings, the largest difference {worst:.1e}; {missing} it has not")
sys.exit(0 if worst < 1e-3 else 1)
