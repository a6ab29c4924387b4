"""What the suite's figures amount to: ratios, targets, shares of the roofline; and as a table."""

from __future__ import annotations

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
        if "step_s" in sections.get(name, {})
    }
    if "ratio" in (found := sections.get("stored", {})):
        met = found["ratio"] >= STORED_TARGET if judged else None
        rows["stored"] = {
            "eager_ratio": found["ratio"], "eager_target": STORED_TARGET, "met": met,
            "store_stems": found["store_stems"],
        }  # fmt: skip
    return rows


def _judged(results: dict[str, Any]) -> bool:
    """Whether targets are for such a run."""
    return results["cuda"] is not None and not results["reduced"]


def _row(
    workload: Workload, figures: dict[str, Any], sections: dict[str, Any], judged: bool
) -> dict[str, Any]:
    step_s = dict(figures["step_s"])
    merged = step_s.pop("merged")
    compiled = sections.get(f"compiled:{workload.name}", {}).get("over_eager")
    if compiled is not None:
        step_s["compiled"] = step_s["eager"] / compiled
    best = min(step_s, key=lambda name: step_s[name])
    row = {
        "models": figures["models"],
        "merged_s": merged,
        **{f"{name}_s": step_s.get(name) for name in _SOLO},
        "eager_ratio": step_s["eager"] / merged,
        "best_solo": best,
        "solo_ratio": step_s[best] / merged,
        "eager_target": workload.eager,
        "solo_target": workload.solo,
        "roofline_share": _share(figures, sections.get("ceilings", {}), merged),
    }
    row["met"] = _met(row) if judged else None
    return row


def _met(row: dict[str, Any]) -> bool:
    return all(row[f"{kind}_ratio"] >= row[f"{kind}_target"] for kind in ("eager", "solo"))


def _share(figures: dict[str, Any], ceilings: dict[str, Any], merged_s: float) -> float | None:
    """The least time of the step's work over the time that the merged step takes."""
    if "flops" not in figures or "bandwidth" not in ceilings:
        return None
    known = Ceilings(ceilings["flops"], ceilings["tf32_flops"], ceilings["bandwidth"])
    work = Work(figures["flops"], figures["bytes"])
    return known.least_s(work, tf32=figures["tf32"]) / merged_s


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
    target = "" if row["met"] is None else f" ({row[f'{kind}_target']:g})"
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
        f"- {name}: {figures['status']}; {figures.get('error', '')}".split("\n")[0]
        for name, figures in sections.items()
        if figures["status"] != "ok"
    ]
    return ["Not measured:", "", *found, ""] if found else []


def _equivalence(figures: dict[str, Any]) -> str:
    """One sentence on what was checked."""
    checks = {name: part for name, part in figures.items() if name in WORKLOADS}
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
    return "passed" if found["passed"] else f"FAILED ({', '.join(found['differ'])})"
