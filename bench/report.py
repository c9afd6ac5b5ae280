"""What the measured runs add up to: medians, ratios to the yardsticks, and whether snapcore reaches its bars.

A ratio is the median of the ratios within each round, so that a machine that drifts between rounds does not
show in it. Every contender gets its ratios; a limit says what snapcore has to reach.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FULL, INCREMENTAL, RESTORE, VERIFY = "full", "incremental", "restore", "verify"


@dataclass(frozen=True)
class Work:
    """One thing to measure: what is done, and with which generation."""

    kind: str
    generation: int

    @property
    def title(self) -> str:
        """What it is called in the table."""
        return self.kind if self.kind == VERIFY else f"{self.kind}, gen{self.generation}"


@dataclass(frozen=True)
class Sample:
    """One measured run.

    Stored bytes are what the repository grew by. Plain bytes are what all generations together consist of:
    the data of the first and the changed 4-KiB blocks of each later one.
    """

    round: int
    work: Work
    contender: str
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    stored_bytes: int
    plain_bytes: int


@dataclass(frozen=True)
class Figure:
    """A value that has a bar, which is passed or not."""

    label: str
    value: float
    bar: str
    passed: bool


@dataclass(frozen=True)
class Row:
    """The medians of one contender at one work."""

    work: Work
    contender: str
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    stored_bytes: int
    figures: list[Figure]


@dataclass(frozen=True)
class Ratio:
    """A quantity of a run, divided by that of the yardstick in the same round."""

    label: str
    quantity: Callable[[Sample], float]
    yardstick: str
    most: float


RATIOS = {
    FULL: (
        Ratio("time ÷ borg-4m", lambda sample: sample.wall_s, "borg-4m", 0.35),
        Ratio("stored ÷ borg-4m", lambda sample: sample.stored_bytes, "borg-4m", 1.05),
    ),
    INCREMENTAL: (Ratio("time ÷ compare", lambda sample: sample.wall_s, "compare", 1.5),),
    RESTORE: (Ratio("time ÷ cp + sync", lambda sample: sample.wall_s, "cp", 1.5),),
    VERIFY: (),
}
LEAST_VERIFIED_GB_PER_CPU_S = 1.5
MOST_RSS_MIB = 256


def rows(samples: Sequence[Sample]) -> list[Row]:
    """One row for each work and contender, in the order of first measurement."""
    keys = dict.fromkeys((sample.work, sample.contender) for sample in samples)
    return [_row(work, contender, samples) for work, contender in keys]


def _row(work: Work, contender: str, samples: Sequence[Sample]) -> Row:
    own = _by_round(samples, work, contender)
    figures = [
        _at_most(ratio.label, value, ratio.most)
        for ratio in RATIOS[work.kind]
        if (value := _ratio(ratio, own, _by_round(samples, work, ratio.yardstick))) is not None
    ]
    if work.kind == VERIFY:
        speed = statistics.median(sample.plain_bytes / sample.cpu_s / 1e9 for sample in own.values())
        figures.append(_at_least("GB per CPU second", speed, LEAST_VERIFIED_GB_PER_CPU_S))
    peak_rss_bytes = max(sample.peak_rss_bytes for sample in own.values())
    figures.append(_at_most("MiB RSS", peak_rss_bytes / 2**20, MOST_RSS_MIB))
    return Row(
        work,
        contender,
        statistics.median(sample.wall_s for sample in own.values()),
        statistics.median(sample.cpu_s for sample in own.values()),
        peak_rss_bytes,
        round(statistics.median(sample.stored_bytes for sample in own.values())),
        figures,
    )


def _by_round(samples: Sequence[Sample], work: Work, contender: str) -> dict[int, Sample]:
    return {each.round: each for each in samples if each.work == work and each.contender == contender}


def _ratio(ratio: Ratio, own: dict[int, Sample], yardstick: dict[int, Sample]) -> float | None:
    """Median over the rounds in which both were measured; None if there are none."""
    values = [ratio.quantity(own[each]) / ratio.quantity(yardstick[each]) for each in own.keys() & yardstick]
    return statistics.median(values) if values else None


def _at_most(label: str, value: float, limit: float) -> Figure:
    return Figure(label, value, f"≤ {limit:g}", value <= limit)


def _at_least(label: str, value: float, limit: float) -> Figure:
    return Figure(label, value, f"≥ {limit:g}", value >= limit)


def table(measured: Sequence[Row], judged: str) -> str:
    """The rows as text; the figures of the judged contender show whether they pass."""
    lines: list[str] = []
    work = None
    for row in measured:
        if row.work != work:
            work = row.work
            lines += ["", f"{work.title:<22}{'wall s':>9}{'CPU s':>9}{'stored MB':>11}"]
        lines.append(_line(row, row.contender == judged))
    return "\n".join(lines[1:])


def _line(row: Row, is_judged: bool) -> str:
    stored = f"{row.stored_bytes / 1e6:,.1f}" if row.work.kind in (FULL, INCREMENTAL) else ""
    figures = (_figure(each) + (_verdict(each) if is_judged else "") for each in row.figures)
    return f"  {row.contender:<20}{row.wall_s:>9.2f}{row.cpu_s:>9.2f}{stored:>11}   {', '.join(figures)}"


def _figure(figure: Figure) -> str:
    decimals = 2 if figure.value < 10 else 0
    return f"{figure.value:.{decimals}f} {figure.label}"


def _verdict(figure: Figure) -> str:
    return f" ({figure.bar}: {'pass' if figure.passed else 'FAIL'})"
