"""Writes the tables of benchmarks from the JSON files in `benchmarks/results/` that the benchmarks wrote.

    python benchmarks/readme_table.py
    python benchmarks/readme_table.py --check

The README gets a short one, between its two markers: of each work and precision the fastest way. Everything that was
measured goes to `benchmarks/results/README.md`. Comparisons come from `against_*.json`, growth from `scaling*.json`,
and what the command `benchmark` measured from `bundle*.json`. Scores on real tissue come from `training_*.json` of
`training_protocols.py`, `compare_*.json` of `compare --json`, and `rounds_*.json` of `rounds`. With `--check` nothing
is written, and the exit code is 1 if one of the two is not what would be written; a test asks the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin, written by benchmarks/readme_table.py -->", "<!-- benchmarks: end -->"

_SECONDS_FROM_MS = 1000.0
_SHOWN_NAMES = ("encoder", "detector", "slice", "volume")


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell whether the tables are up to date")
    arguments = parser.parse_args()
    stale = [path for path, text in documents(ROOT).items() if not path.is_file() or path.read_text("utf-8") != text]
    if arguments.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"{names} not as benchmarks/results says: run this without --check" if stale else "up to date")
        return int(bool(stale))
    for path in stale:
        path.write_text(documents(ROOT)[path], encoding="utf-8")
    return 0


def documents(root: Path) -> dict[Path, str]:
    """Return the files that hold tables, as they should be."""
    readme, results = root / "README.md", root / "benchmarks" / "results"
    return {
        readme: with_table(readme.read_text(encoding="utf-8"), summary(results)),
        results / "README.md": f"# Every figure\n\nWritten by `benchmarks/readme_table.py`.\n\n{tables(results)}",
    }


def with_table(readme: str, content: str) -> str:
    """Return the README with the content between its markers.

    Raises
    ------
    ValueError
        Where the markers are not there once each, in their order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}, once each and in this order")
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{content}{END}{tail}"


def summary(folder: Path) -> str:
    """Return the fastest of our ways to do each work at each precision, against the others' way, as Markdown."""
    rows = [["what", "by", "median", "as fast as"]]
    for path in sorted(folder.glob("against_*.json")):
        document = read(path)
        medians = {(row["work"], row["by"]): row["median_ms"] for row in document["rows"]}
        fastest: dict[tuple[str, str], dict[str, Any]] = {}
        base = document["ratios"][0]["over"]
        for ratio in document["ratios"]:
            if ratio["over"] != base or not ratio["by"].startswith("ours"):
                continue
            key = ratio["work"], ratio["by"].split()[-1]
            if key not in fastest or ratio["value"] > fastest[key]["value"]:
                fastest[key] = ratio
        for ratio in fastest.values():
            spread = f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) times {base}"
            rows.append([ratio["work"], ratio["by"], duration(medians[ratio["work"], ratio["by"]]), spread])
    for path in sorted(folder.glob("bundle*.json")):
        document = read(path)
        for ratio in document["ratios"]:
            if ratio["name"] == "end_to_end_over_encoder":
                how = f"{ratio['engine']} {ratio['device']} {ratio['precision']}"
                what = f"{ratio['row']}, {document['settings']['boxes_per_slice'] or 'detected'} objects in each"
                share = f"{ratio['value']:.0%} ({ratio['low']:.0%} to {ratio['high']:.0%}) of the encoder alone"
                rows.append([what, how, "", share])
    return markdown(rows) if len(rows) > 1 else "No benchmark has been run yet.\n"


def tables(folder: Path) -> str:
    """Return everything that the results say, as Markdown."""
    parts = [
        *(comparison(read(path), path.name) for path in sorted(folder.glob("against_*.json"))),
        *(of_bundle(read(path), path.name) for path in sorted(folder.glob("bundle*.json"))),
        *(growth(read(path), path.name) for path in sorted(folder.glob("scaling*.json"))),
        *(protocols(read(path), path.name) for path in sorted(folder.glob("training_*.json"))),
        *(prompts(read(path), path.name) for path in sorted(folder.glob("compare_*.json"))),
        *(rounds(read(path), path.name) for path in sorted(folder.glob("rounds_*.json"))),
    ]
    return "\n".join(parts) if parts else "No benchmark has been run yet.\n"


def read(path: Path) -> dict[str, Any]:
    """Read a file of results."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def comparison(document: dict[str, Any], name: str) -> str:
    """Return the table of one comparison: every contestant, and how much faster it is than the others' own way."""
    settings = document["settings"]
    model = f"{settings['model_type']} at {settings['image_size_px']} px, {settings['weights']} weights"
    bases = list(dict.fromkeys(ratio["over"] for ratio in document["ratios"]))
    rows = [["what", "by", "median", *(f"times {base}" for base in bases)]]
    for row in document["rows"]:
        of_row = {r["over"]: r for r in document["ratios"] if (r["work"], r["by"]) == (row["work"], row["by"])}
        found = [of_row.get(base) for base in bases]
        cells = [f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f})" if r else "" for r in found]
        rows.append([row["work"], row["by"], duration(row["median_ms"]), *cells])
    text = f"`{name}`, {where(document)}; {model}, {settings['repeats']} rounds:\n\n{markdown(rows)}"
    notes = list(agreements(document))
    return text + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def agreements(document: dict[str, Any]) -> Iterator[str]:
    """Say how right contestants are, where that was measured."""
    for key, weights in (("agreement", "these weights"), ("agreement_of_the_packaged_weights", "the packaged weights")):
        for who, found in document.get(key, {}).items():
            yield (
                f"masks by {weights}, {who}: IoU with the predictor's {found['mean']:.3f} on average, at least "
                f"{found['least']:.3f}"
            )
    for who, difference in document.get("largest_difference_over_std", {}).items():
        yield f"logits, {who}: at most {difference:.1e} standard deviations from the predictor's"
    for who, reason in document.get("missing", {}).items():
        yield f"not measured: {who}: {reason}"


def of_bundle(document: dict[str, Any], name: str) -> str:
    """Return the table of a report of the command `benchmark`."""
    rows = [["what", "batch", "by", "median", "p90", "per second", "of peak", "peak memory"]]
    for row in document["rows"]:
        if row["name"] not in _SHOWN_NAMES and not row["name"].startswith("decoder"):
            continue
        peak = row["peak_device_mb"] if row["peak_device_mb"] is not None else row["peak_rss_mb"]
        rows.append(
            [
                row["name"],
                str(row["batch"]),
                f"{row['engine']} {row['device']} {row['precision']}",
                duration(row["median_ms"]),
                duration(row["p90_ms"]),
                f"{row['per_second']:.3g}",
                "" if row["of_peak"] is None else f"{row['of_peak']:.0%}",
                "" if peak is None else f"{peak / 1000:.1f} GB",
            ]
        )
    settings = document["settings"]
    what = f"{settings['subject']}, {settings['boxes_per_slice'] or 'detected'} objects in each"
    text = f"`{name}`, {where(document)}; bundle {document['bundle']}, {what}:\n\n{markdown(rows)}"
    notes = [
        f"- {ratio['row']}, {ratio['engine']} {ratio['device']} {ratio['precision']}: {ratio['value']:.0%} of the "
        "throughput of the encoder alone"
        for ratio in document["ratios"]
        if ratio["name"] == "end_to_end_over_encoder"
    ]
    return text + ("\n" + "\n".join(notes) + "\n" if notes else "")


def growth(document: dict[str, Any], name: str) -> str:
    """Return the table of how a run grows."""
    rows = [["with", "from", "to", "time grows with the power", "misfit of a straight line", "peak memory"]]
    for what, found in document["scaling"].items():
        low, high = found["sizes"][0], found["sizes"][-1]
        memory = f"{found['memory_mb'][0]:.0f} to {found['memory_mb'][-1]:.0f} MB ({found['memory_ratio']:.2f} times)"
        fit = [f"{found['exponent']:.2f}", f"{found['linear_misfit']:.1%}"]
        rows.append([what, f"{low:.0f}", f"{high:.0f}", *fit, memory])
    model = f"{document['settings']['model_type']} at {document['settings']['image_size_px']} px"
    return f"`{name}`, {where(document)}; whole runs of `segment`, {model}:\n\n{markdown(rows)}"


def protocols(document: dict[str, Any], name: str) -> str:
    """Return the table of training protocols that had equal CPU time: mean IoU of test objects by kind of prompt."""
    kinds = {"box": "exact boxes", "jittered": "boxes 5 to 15 % off", "point": "one point"}
    rows = [["weights", "steps", *kinds.values()]]
    for who, found in document["test"].items():
        steps = str(document["protocols"][who]["steps"]) if who in document["protocols"] else ""
        rows.append([f"protocol {who}" if steps else who, steps, *(f"{found[kind]:.3f}" for kind in kinds)])
    settings = document["settings"]
    first, end = settings["test_slices"]
    text = (
        f"`{name}`, {where(document)}; {settings['model']} at {settings['image_size_px']} px, "
        f"{settings['minutes_of_cpu']:g} minutes of CPU time each, mean IoU on slices {first} to {end - 1}, which no "
        f"training saw:\n\n{markdown(rows)}"
    )
    notes = [
        f"- {kinds[found['prompt']]}: {found['of']} over {found['over']} {found['gain']:+.3f} "
        f"({found['low']:+.3f} to {found['high']:+.3f} over slices)"
        for found in document["differences"]
        if found["over"] in document["protocols"]
    ]
    return text + ("\n" + "\n".join(notes) + "\n" if notes else "")


def prompts(document: dict[str, Any], name: str) -> str:
    """Return the table of a report of the command `compare`: means over slices, and changes in per cent."""
    columns = {"oce": "OCE", "pq": "PQ", "sq": "SQ", "dq": "DQ", "s_inst": "S_inst", "msa": "mSA", "dice": "Dice"}
    rows = [["bundle", "prompts", *columns.values()]]
    for row in document["rows"]:
        cells = []
        for key in columns:
            change = row["relative_percent"].get(key, {}).get("percent")
            cells.append(f"{row[key]:.3f}" + ("" if change is None else f" ({change:+.1f} %)"))
        rows.append([row["bundle"], row["prompts"].replace("_", " "), *cells])
    slices = document["slices"]
    lines = [f"`{name}`, means over {len(slices)} slices, {slices[0]} to {slices[-1]}:\n\n{markdown(rows)}"]
    lines += [f"- {curve['bundle']}: {curve['verdict']}\n" for curve in document["curves"]]
    return "\n".join([lines[0], "".join(lines[1:])]) if lines[1:] else lines[0]


def rounds(document: dict[str, Any], name: str) -> str:
    """Return the table of a report of the command `rounds`."""
    rows = [["round", "held-out IoU, exact boxes", "held-out PQ, automatic", "masks found", "kept", "their precision"]]
    for entry in document["rounds"]:
        share = entry["mask_precision"]
        counts = [str(entry["masks"]), str(entry["kept"])] if entry["number"] else ["", ""]
        scores = [f"{entry['held_out_box_iou']:.3f}", f"{entry['held_out_pq']:.3f}"]
        rows.append([str(entry["number"]), *scores, *counts, "" if share is None else f"{share:.2f}"])
    roles = ", ".join(f"{role.replace('_', ' ')} {text}" for role, text in document["slices"].items())
    return f"`{name}`, slices: {roles}:\n\n{markdown(rows)}\n{document['verdict']}\n"


def where(document: dict[str, Any]) -> str:
    """Name the machine, and say how busy it was."""
    host = document["host"]
    machine = ", ".join([host["processor"], f"{host['cpu_cores']} cores", *host["gpus"]])
    return f"{machine}, load average before {host['load_average']}"


def duration(milliseconds: float) -> str:
    """Write a duration with three digits that count."""
    if milliseconds >= _SECONDS_FROM_MS:
        return f"{milliseconds / _SECONDS_FROM_MS:.3g} s"
    return f"{milliseconds:.3g} ms"


def markdown(rows: list[list[str]]) -> str:
    """Write a table whose first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
