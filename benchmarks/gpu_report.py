"""What the suite's figures amount to: ratios, targets, shares of the roofline; and as a table."""

from __future__ import annotations

import statistics
from typing import Any

from gpu_counting import Ceilings, Work
from gpu_workloads import STORED_TARGET, WORKLOADS, Workload

#: Said of every results file without figures of a GPU.
NO_CUDA = (
    "CUDA figures are missing: this run was on a CPU, to show that the suite runs. Its ratios say "
    "nothing about a GPU and are held against no target."
)

_SOLO = ("eager", "captured", "compiled")


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """A row for each workload that was measured, and one for stored activations."""
    sections = results["sections"]
    judged = _judged(results)
    rows = {
        name: _row(workload, sections[name], sections, judged)
        for name, workload in WORKLOADS.items()
        if {"merged", "eager"} <= set(step_seconds(sections.get(name, {})))
    }
    if {"serial_s", "epoch_s"} <= set(found := sections.get("stored", {})):
        rows["stored"] = _stored_row(found, sections, judged)
    return rows


def step_seconds(figures: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of all models, by method; solo ones were measured on a sample."""
    scale = figures.get("scale", 1.0)
    if "step_s" in figures:  # as results had them at first
        return dict(figures["step_s"])
    return {
        name: statistics.median(row) * (1.0 if name == "merged" else scale)
        for name, row in figures.get("rows", {}).items()
        if row
    }


def _judged(results: dict[str, Any]) -> bool:
    """Whether targets are for such a run."""
    return results["cuda"] is not None and not results["reduced"]


def _row(
    workload: Workload, figures: dict[str, Any], sections: dict[str, Any], judged: bool
) -> dict[str, Any]:
    step_s = step_seconds(figures)
    merged = step_s.pop("merged")
    compiled = sections.get(f"compiled:{workload.name}", {}).get("over_eager")
    if compiled is not None:
        step_s["compiled"] = step_s["eager"] / compiled
    best = min(step_s, key=lambda name: step_s[name])
    least_s = _least_s(figures, sections.get("ceilings", {}))
    row = {
        "models": figures["models"],
        "merged_s": merged,
        **{f"{name}_s": step_s.get(name) for name in _SOLO},
        "eager_ratio": step_s["eager"] / merged,
        "best_solo": best,
        "solo_ratio": step_s[best] / merged,
        "eager_target": workload.eager,
        "solo_target": workload.solo,
        "roofline_share": least_s and least_s / merged,
        "solo_roofline_share": least_s and least_s / step_s[best],
    }
    row["met"] = _met(row) if judged else None
    return row


def _met(row: dict[str, Any]) -> bool:
    return all(row[f"{kind}_ratio"] >= row[f"{kind}_target"] for kind in ("eager", "solo"))


def _stored_row(figures: dict[str, Any], sections: dict[str, Any], judged: bool) -> dict[str, Any]:
    """Whole trainings of a few epochs; of those that are there, where not all are."""
    part = len(figures["epoch_s"]) / figures["epochs"]
    merged = sum(figures["epoch_s"])
    serial = figures["serial_s"] * part
    captured = figures.get("captured_s")
    compiled = sections.get("compiled:heads", {}).get("over_eager")
    solos = {
        "eager": serial,
        "captured": captured and captured * part,
        "compiled": compiled and serial / compiled,
    }
    known = {name: seconds for name, seconds in solos.items() if seconds}
    best = min(known, key=lambda name: known[name])
    least_s = _least_s(figures, sections.get("ceilings", {}))
    ratio = serial / merged
    return {
        "models": figures["models"],
        "epochs": len(figures["epoch_s"]),
        "merged_s": merged,
        **{f"{name}_s": solos[name] for name in _SOLO},
        "eager_ratio": ratio,
        "last_epoch_ratio": serial / part / figures["epochs"] / figures["epoch_s"][-1],
        "best_solo": best,
        "solo_ratio": known[best] / merged,
        "eager_target": STORED_TARGET,
        # The work is that of all epochs.
        "roofline_share": least_s / merged if least_s and part == 1 else None,
        "met": ratio >= STORED_TARGET if judged else None,
        "store_stems": figures["store_stems"],
    }


def _least_s(figures: dict[str, Any], ceilings: dict[str, Any]) -> float | None:
    """The least time of the work, by what the device was seen to reach."""
    if "flops" not in figures or "bandwidth" not in ceilings:
        return None
    known = Ceilings(ceilings["flops"], ceilings["tf32_flops"], ceilings["bandwidth"])
    work = Work(figures["flops"], figures["bytes"])
    return known.least_s(work, tf32=figures["tf32"])


def page(results: dict[str, Any]) -> str:
    """A page of plain text: what was equal, what was measured, and what is missing and why."""
    cuda, sections = results["cuda"], results["sections"]
    where = cuda["name"] if cuda else "a CPU: says nothing about a GPU"
    head = f"{'':<10}{'models':>7}{'merged':>9}{'eager':>9}{'graphs':>9}{'compiled':>9}"
    return "\n".join([
        f"== {where}; torch {results['environment']['torch']}; {results['spent_s']:.0f} of "
        f"{results['budget_s']:.0f} s ==",
        _equivalence(sections.get("equivalence", {})),
        _ceilings(sections.get("ceilings", {})),
        "Milliseconds of a step of all models (stored: seconds of all epochs); merged over eager "
        "and over the best",
        "solo method, with what is to be reached; the share of the roofline; seconds to the first "
        "step.",
        f"{head}{'x eager':>15}{'x solo':>15}{'roofline':>9}{'first':>7}",
        *(_page_line(name, row, sections[name]) for name, row in results["summary"].items()),
        *(f"{name}: {_why(figures)}" for name, figures in sections.items()
          if figures["status"] != "ok"),
    ]) + "\n"  # fmt: skip


def _page_line(name: str, row: dict[str, Any], figures: dict[str, Any]) -> str:
    unit = 1.0 if name == "stored" else 1000.0
    times = (row[f"{key}_s"] for key in ("merged", *_SOLO))
    cells = "".join(f"{'-' if t is None else f'{unit * t:.2f}':>9}" for t in times)
    ratios = "".join(f"{_ratio(row, kind):>15}" for kind in ("eager", "solo"))
    share, first = row["roofline_share"], figures.get("first_step_s")
    last = f"{'-' if share is None else f'{share:.0%}':>9}{_seconds(first):>7}"
    return f"{name:<10}{row['models']:>7}{cells}{ratios}{last}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ceilings(figures: dict[str, Any]) -> str:
    if "bandwidth" not in figures:
        return "Ceilings: not measured."
    fast = figures["tf32_flops"]
    tf32 = "no TF32" if fast is None else f"{fast / 1e12:.0f} with TF32"
    return (
        f"Ceilings: {figures['flops'] / 1e12:.2f} TFLOP/s in float32, {tf32}, "
        f"{figures['bandwidth'] / 1e9:.0f} GB/s."
    )


def _why(figures: dict[str, Any]) -> str:
    return f"{figures['status']}; {figures.get('error', '')}".split("\n")[0][:300]


def markdown(results: dict[str, Any]) -> str:
    """The README's section on these results."""
    cuda = results["cuda"]
    versions = results["environment"]
    where = f"{cuda['name']}, driver {cuda['driver']}" if cuda else versions["device"]
    reduced = ", at reduced size" if results["reduced"] else ""
    lines = [
        *((NO_CUDA, "") if cuda is None else ()),
        f"Measured on {where}{reduced}, torch {versions['torch']}, {versions['date']}. "
        "Milliseconds of a step of all models; ratios are of the solo method's time to the merged "
        "time.",
        "",
        "| workload | merged | eager | CUDA graphs | compiled | over eager (target) "
        "| over best solo (target) | roofline | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(name, results) for name in WORKLOADS if name in results["summary"]),
        "",
        *_stored(results["summary"].get("stored")),
        *_missing(results["sections"]),
        _equivalence(results["sections"].get("equivalence", {})),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, results: dict[str, Any]) -> str:
    row, figures = results["summary"][name], results["sections"][name]
    share, peak = row["roofline_share"], figures.get("peak_bytes")
    cells = [
        WORKLOADS[name].title if not results["reduced"] else f"{name}, {row['models']} models",
        *(_ms(row[f"{key}_s"]) for key in ("merged", *_SOLO)),
        _ratio(row, "eager"),
        _ratio(row, "solo"),
        "-" if share is None else f"{share:.0%}",
        "-" if peak is None else f"{peak / 2**30:.1f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def _ratio(row: dict[str, Any], kind: str) -> str:
    """With its target, where targets are for such a run."""
    unknown = row["met"] is None or f"{kind}_target" not in row
    target = "" if unknown else f" ({row[f'{kind}_target']:g})"
    return f"{row[f'{kind}_ratio']:.1f}{target}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _stored(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return []
    how = "activations stored" if row["store_stems"] else "activations not stored in this version"
    target = "" if row["met"] is None else f" (target {row['eager_target']:g})"
    ratio = row["eager_ratio"]
    return [f"Heads for five epochs, {how}: {ratio:.1f} of the serial loop{target}.", ""]


def _missing(sections: dict[str, Any]) -> list[str]:
    """What was not measured, and why."""
    found = [
        f"- {name}: {_why(figures)}"
        for name, figures in sections.items()
        if figures["status"] != "ok"
    ]
    return ["Not measured:", "", *found, ""] if found else []


def _equivalence(figures: dict[str, Any]) -> str:
    """One sentence on what was checked."""
    checks = {name: part for name, part in figures.items() if name in WORKLOADS}
    if not checks and "bits" not in figures:
        return "Equivalence: not checked."
    passed = [name for name, part in checks.items() if part["passed"]]
    bits = figures.get("bits", {})
    verdicts = [
        f"{what} {_verdict(bits.get(key))}"
        for what, key in (("equal bits of two runs:", "repeat"), ("a NaN beside:", "nan"))
    ]
    return (
        f"Float64 losses of 100 steps equal the plain loop's in {len(passed)} of {len(checks)} "
        f"families; {', '.join(verdicts)}."
    )


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not checked"
    if found["passed"]:
        return "passed"
    return f"FAILED ({', '.join(found['differ']) or 'no model became NaN'})"
