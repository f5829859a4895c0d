"""Make a file of `compiled/` from a report: `python tests/planning/record.py configs/NAME.py plan.json > FILE`.

The report is one that `python -m moe_jax.plan --config=configs/NAME.py --json=plan.json` wrote, with any
`--config.mesh.expert` and `--config.model.remat`.
"""

import json
import sys
from collections import Counter
from pathlib import Path


def record(config, report):
    """The seconds of a compilation by kind of exchange, and of its schedule."""
    seconds = Counter()
    for row in report["collectives"]:
        seconds[row["kind"]] += row["seconds"]
    policy, *names = report["remat"].split()
    return {
        "config": config,
        "expert": report["mesh"]["expert"],
        "remat": policy,
        "remat_keep": names,
        "topology": report["topology"],
        "versions": report["versions"],
        "seconds": {kind: round(s, 5) for kind, s in seconds.items()},
        "scheduled": round(report["schedule"]["seconds"], 4),
    }


if __name__ == "__main__":
    print(json.dumps(record(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())), indent=1))
