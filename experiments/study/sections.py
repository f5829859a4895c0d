"""The sections below the claims, each from the main sweep's logs; a section without finished runs says so."""

from collections.abc import Mapping
from dataclasses import replace

from moe_jax.config import flatten

from ..report.branched import Branched
from ..report.columns import BALANCE, QUALITY, Table, show
from ..report.crossed import on_trunk
from ..report.crossed_page import crossed_section
from ..report.experts import bias_trajectories, load_heatmaps
from ..report.numbers import last
from ..report.sweep import Sweep, as_number
from . import measures, pictures
from .arms import BASELINE, CORE, EXPERTS, SCOPES, WEIGHTS, Point, effects, levels, main_sweep, only, points
from .devices import DEVICES, POD_EXCHANGES, POD_STEP, device_factor, mean_rounds, random_factor
from .measures import SEQUENCE, Found, Tables
from .parts import Part, Section, sources, table, text
from .parts import pictures as shown

NOTHING = text("No block is complete yet: this needs the arms on the trunks of every method.")
INFORMATION = "eval/domain_information"


def frontier_section(tables: Tables) -> Section:
    """Quality against balance, every arm."""
    title = "Quality against balance"
    sweep = main_sweep(tables)
    found = points(tables, sweep.arms if sweep else [])
    if len(found) < 2:
        return Section(title, [NOTHING])
    rows = [_point_row(point) for point in found.values()]
    headers = ["arm", "blocks", BALANCE.title, f"bits per byte minus {BASELINE}'s"]
    return Section(
        title,
        [
            shown([pictures.frontier(found)], in_markdown=True),
            shown([pictures.rules(found), pictures.scopes(found)]),
            table(Table(headers, rows), baseline=BASELINE),
            text("Mean over trunk seeds ± half-width of the 95 % t-interval. * The interval excludes 0.", note=True),
            sources(tables, [run for point in found.values() for run in point.runs]),
        ],
    )


def _point_row(point: Point) -> list[str]:
    n = str(point.violation.n)
    difference = "-" if point.arm == BASELINE else show(point.difference, 4, signed=True)
    return [point.arm, n, show(point.violation, BALANCE.digits), difference]


def crossed_part(tables: Tables) -> Section:
    """The crossed table of the core methods."""
    title = "Trunk by arm"
    sweep = main_sweep(tables)
    if sweep is None or not sweep.runs:
        return Section(title, [text("No branch is finished yet.")])
    core = only(sweep, CORE)
    html = crossed_section(core).removeprefix(f"<h2>{title}</h2>")
    part = Part(html, table(_crossed_table(core)).markdown)
    return Section(title, [part, sources(tables, core.runs.values())])


def _crossed_table(sweep: Branched) -> Table:
    """The same as a table of text: the mean, and the difference to the baseline below it."""
    values = sweep.values(QUALITY)
    rows = []
    for trunk in sweep.trunks.arms:
        cells = []
        for arm in sweep.arms:
            mean, difference, _ = on_trunk(sweep, values, trunk, arm)
            cells.append(f"{mean}\n{show(difference, QUALITY.digits, signed=True)}" if difference.n else mean)
        rows.append([trunk, *cells])
    return Table(["trunk", *sweep.arms], rows)


def interference_section(tables: Tables) -> Section:
    """The ratio of gradient norms over training, by weight."""
    title = "Interference by weight"
    sweep = main_sweep(tables)
    picture = pictures.interference(sweep) if sweep else None
    if sweep is None or picture is None:
        return Section(title, [text("No run has logged its gradients yet.")])
    runs = [run.directory for run in sweep.trunks.finished]
    runs += [run.directory for branch, run in sweep.runs.items() if branch.arm in WEIGHTS]
    return Section(title, [shown([picture], in_markdown=True), sources(tables, runs)])


def experts_section(tables: Tables) -> Section:
    """Biases and loads of single experts: of the first trunk of each method, and of branches of one."""
    title = "Single experts: biases and loads"
    sweep = main_sweep(tables)
    if sweep is None:
        return Section(title, [text("No run is finished yet.")])
    parts: list[Part] = []
    for what, plain in _plain_sweeps(sweep).items():
        found = [picture for maker in (bias_trajectories, load_heatmaps) if (picture := maker(plain))]
        if found:
            titled = [picture._replace(title=f"{picture.title}, {what}") for picture in found]
            first = [runs[min(runs)] for runs in plain.runs.values() if runs]
            parts += [shown(titled), sources(tables, first)]
    return Section(title, parts or [text("No finished run has logged single experts yet.")])


def _plain_sweeps(sweep: Branched) -> dict[str, Sweep]:
    """What is shown -> trunks, and branches of the first trunk that has some, as plain sweeps."""
    found = {"trunks": sweep.trunks}
    for (method, seed), part in sweep.parts.items():
        if part.finished:
            kept = [arm for arm in EXPERTS if part.runs.get(arm)]
            if kept:
                runs = {arm: part.runs[arm] for arm in kept}
                baseline = part.baseline if part.baseline in kept else kept[0]
                found[f"branches of trunk {method}, seed {seed}"] = replace(
                    part, arms=kept, runs=runs, baseline=baseline
                )
                break
    return found


def scopes_section(tables: Tables) -> Section:
    """Loss, domain information and balance within sequences, by the scope of the auxiliary loss."""
    title = "The scope of the auxiliary loss"
    losses = effects(tables, SCOPES, last(measures.QUALITY))
    information = levels(tables, SCOPES, last(INFORMATION))
    within = levels(tables, SCOPES, last(SEQUENCE))
    panels = {
        f"bits per byte minus {BASELINE}'s": losses,
        "domain information, bits per copy": information,
        "max violation in a sequence": within,
    }
    picture = pictures.strips(
        "scopes",
        "Narrow scopes: what they cost, and what experts know of the domain",
        f"{pictures.DOTS}. Arms sequence_* balance every sequence, two_sequences_* pairs, the others a batch of 8.",
        panels,
        SCOPES,
        (0.0, None, None),
    )
    if picture is None:
        return Section(title, [NOTHING])
    rows = [
        [
            arm,
            _shown(losses, arm, 4, signed=True),
            _shown(information, arm, 4),
            _shown(within, arm, 3),
        ]
        for arm in SCOPES
        if any(arm in found for found in panels.values())
    ]
    runs = [run for found in panels.values() for one in found.values() for run in one.runs]
    content = table(Table(["arm", *panels], rows), baseline=BASELINE)
    return Section(title, [shown([picture], in_markdown=True), content, sources(tables, runs)])


def devices_section(tables: Tables) -> Section:
    """What imbalance costs in a model of expert parallelism."""
    title = "What imbalance would cost"
    sweep = main_sweep(tables)
    arms = sweep.arms if sweep else []
    found = levels(tables, arms, device_factor)
    if sweep is None or not found:
        return Section(title, [NOTHING])
    rounds = levels(tables, arms, mean_rounds)
    order = sorted(found, key=lambda arm: found[arm].interval.mean)
    even = _random_factor(sweep)
    picture = pictures.strips(
        "devices",
        f"The slowest of {DEVICES} devices, and their rounds of exchange",
        f"{pictures.DOTS}. Dashed: a router that chooses at random ({even:.3f}), and a single round.",
        {"factor on the time of experts (1: even loads)": found, "rounds of exchange": rounds},
        order,
        (even, 1.0),
    )
    rows = [
        [arm, show(found[arm].interval, 3), f"{found[arm].interval.mean - 1:.1%}", _shown(rounds, arm, 2)]
        for arm in order
    ]
    runs = [run for one in (*found.values(), *rounds.values()) for run in one.runs]
    return Section(
        title,
        [
            text(_devices_words(sweep)),
            shown([picture]),
            table(Table(["arm", "factor on the experts' time", "longer by", "rounds"], rows), baseline=BASELINE),
            sources(tables, runs),
        ],
    )


def _devices_words(sweep: Branched) -> str:
    each = _number(sweep, "model.num_experts") // DEVICES
    return (
        f"A model, not a measurement: the runs used one device. With {DEVICES} devices of {each} consecutive experts, "
        "every device of a synchronous step waits, layer by layer, for the one with the most token copies. The factor "
        "is the largest load of a device over the mean, averaged over layers and the logged steps of the last quarter "
        "of each branch. It concerns the experts' part of the step alone. Before the experts, copies are exchanged in "
        f"rounds, with room for {_factor(sweep):g} times the mean number of copies between two devices; one pair with "
        "more makes all devices repeat the exchange. Rounds are those of the first held-out batch at the end of each "
        "branch, all of one domain, which is an uneven case. Both concern batches of "
        f"{_tokens(sweep):,} tokens: larger batches are more even. What a pod would lose: in the plan of DeepSeek-V3 "
        f"on 2048 chips, exchanges in one round take {POD_EXCHANGES:.1f} of the step's {POD_STEP:.1f} s, so a second "
        f"round in every layer would make the step up to {POD_EXCHANGES / POD_STEP:.0%} longer."
    )


def _random_factor(sweep: Branched) -> float:
    experts, top_k = _number(sweep, "model.num_experts"), _number(sweep, "model.top_k")
    return random_factor(_tokens(sweep), experts, top_k)


def _tokens(sweep: Branched) -> int:
    return _number(sweep, "batch_size") * _number(sweep, "sequence_length")


def _factor(sweep: Branched) -> float:
    return as_number(flatten(sweep.config)["model.capacity_factor"])


def _number(sweep: Branched, key: str) -> int:
    return int(as_number(flatten(sweep.config)[key]))


def _shown(found: Mapping[str, Found], arm: str, digits: int, signed: bool = False) -> str:
    return show(found[arm].interval, digits, signed) if arm in found else "-"
