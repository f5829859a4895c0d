"""Whether two checkouts train the same numbers: `python tests/same_numbers.py OTHER_CHECKOUT [NAME ...]`.

Trains 20 steps of five configs on one pinned core, and of tiny on a mesh of eight devices, in each checkout, and
compares the bits of every logged loss, load and bias; NAME chooses some of the runs. A change that only moves code
must leave them equal. Ends with status 1 where they differ.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = ("batch_size=2", "sequence_length=64", "data.eval_sequences=2")
RUNS = {  # name -> config, further overrides, fake devices
    "tiny": ("tiny", (), 1),
    "deepseek_v3_mini": ("deepseek_v3_mini", SMALL, 1),
    "deepseek_v4_mini": ("deepseek_v4_mini", SMALL, 1),
    "gshard": ("gshard", SMALL, 1),
    "switch": ("switch", SMALL, 1),
    "tiny on 8 devices": ("tiny", ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2"), 8),
}
STEPS = 20


def train(checkout: Path, config: str, overrides: tuple[str, ...], devices: int, workdir: Path) -> None:
    """Run the training command of a checkout on one core."""
    flags = ("num_steps=20", "log_every=1", "eval_every=0", "save_every=0", *overrides)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "moe_jax.train", f"--config=configs/{config}.py", f"--workdir={workdir}"]
    command += [f"--config.{flag}" for flag in flags] + [f"--stop_at={STEPS}"]
    subprocess.run(
        command,
        cwd=checkout,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )


def numbers(workdir: Path) -> dict[str, str]:
    """Digests of what was logged: losses, loads, biases."""
    metrics, layers = (
        [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "layers")
    )
    assert len(metrics) == STEPS, f"{workdir} has {len(metrics)} steps"
    logged = {"loss": [line["loss"] for line in metrics]}
    logged |= {name: [line[name] for line in layers] for name in ("loads", "bias")}
    return {name: hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12] for name, values in logged.items()}


def main() -> None:
    """Train in both checkouts and print the table."""
    if not sys.argv[1:]:
        sys.exit(__doc__)
    checkouts = [Path(sys.argv[1]).resolve(), Path(__file__).resolve().parent.parent]
    names = sys.argv[2:] or list(RUNS)
    different = []
    print(f"{'config':20} {'':6} {'first':12} {'second':12}")
    for name in names:
        config, overrides, devices = RUNS[name]
        found = []
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as workdir:
                train(checkout, config, overrides, devices, Path(workdir))
                found.append(numbers(Path(workdir)))
        for key, first in found[0].items():
            second = found[1][key]
            different += [f"{name} {key}"] * (first != second)
            print(f"{name:20} {key:6} {first:12} {second:12} {'' if first == second else 'DIFFERENT'}", flush=True)
    sys.exit(f"different: {', '.join(different)}" if different else 0)


if __name__ == "__main__":
    main()
