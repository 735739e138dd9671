"""Tables: of eval.py's metrics, in percent, and the two forms that all tables have."""

from lib.gain import CAUSES
from lib.openings import PARTS


def rows_of(summary: dict) -> dict[str, dict]:
    """Return the parts of a summary by the names of a table's rows."""
    rows = {"all": summary["overall"], **summary["by_type"]}
    for name, part in summary["by_difficulty"].items():
        rows[f"difficulty {name}" if name in rows else name] = part
    return rows


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(part: dict, key: str = "mean") -> str:
    """Format a change and its interval."""
    values = (part[key], *part["ci95"])
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in values))


def largest_pass_rate(metrics: dict) -> str:
    """Return the key of pass@k with the largest k, which comes last."""
    return [key for key in metrics if key.startswith("pass@") and key[5:].isdigit()][-1]


def format_table(rows: list[list[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Format rows as Markdown, the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def strategy_columns(summary: dict) -> dict[str, str]:
    """Return headings and keys of what strategies say: of matching, or of the commonest labels."""
    if summary["overall"]["match_rate"] is not None:
        return {"matching": "match_rate", "right if matching": "accuracy_given_match"}
    taken = sorted(summary["by_strategy"].items(), key=lambda item: -item[1]["responses"])
    return {strategy: f"{strategy}_share" for strategy, _ in taken[:4]}


def table(summary: dict) -> str:
    """Format the metrics of one checkpoint."""
    columns = {key: key for key in ("pass@1", largest_pass_rate(summary["overall"]))}
    if summary["overall"]["match_rate"] is not None:
        columns |= {"verified": "verified@1"}
        columns |= {strategy: f"{strategy}_share" for strategy in summary["by_strategy"]}
    columns |= strategy_columns(summary)
    rows = [["", *columns, "95% interval", "problems"]]
    for name, metrics in rows_of(summary).items():
        interval = "{} - {}".format(*map(percent, metrics["ci95"]))
        cells = [percent(metrics.get(key, 0.0)) for key in columns.values()]
        rows.append([name, *cells, interval, str(metrics["problems"])])
    return format_table(rows)


def comparison_table(metrics: dict) -> str:
    """Format two checkpoints, what changed, and why: what eval.report has found of them."""
    names = ("before", "after", "difference", "reasons")
    before, after, difference, reasons = (metrics[name] for name in names)
    whys = rows_of(reasons) if reasons else {}

    def change_of(a: dict, b: dict, key: str) -> str:
        return f"{percent(a.get(key, 0.0))} -> {percent(b.get(key, 0.0))}"

    columns = {"pass@1": "pass@1"} | strategy_columns(before) | strategy_columns(after)
    rows = [["", *columns, "change"] + ["= selection", "+ improvement"] * bool(whys)]
    tables = [rows_of(x) for x in (before, after, difference)]
    for name, a, b, change in zip(tables[0], *(table.values() for table in tables)):
        parts = [signed(change, "pass@1")]
        parts += [signed(whys[name][part]) for part in ("selection", "improvement") if whys]
        rows.append([name, *(change_of(a, b, key) for key in columns.values()), *parts])
    a, b = before["overall"], after["overall"]
    key, of_all = largest_pass_rate(a), difference["overall"]
    note = f"all problems: {key} {change_of(a, b, key)}"
    found = f"problems solved only after: {of_all['solved']}, only before: {of_all['lost']}"
    if a["match_rate"] is not None:
        shown = (f"{cause} {100 * whys['all'][cause]['mean']:+.1f}" for cause in CAUSES)
        note += f"; improvement by {', '.join(shown)}"
        keys = dict.fromkeys(("verified@1", key.replace("pass", "verified")))
        verified = ", ".join(f"{key} {change_of(a, b, key)}" for key in keys)
        found = f"right without a wrong line or a guess: {verified}; {found}"
    if reasons != metrics["imputed"]:
        imputed = [metrics["imputed"]["overall"][part] for part in ("selection", "improvement")]
        selection, improvement = (100 * part["mean"] for part in imputed)
        found += "\nstrategies that only one policy took were forced; with imputed accuracies:"
        found += f" selection {selection:+.1f}, improvement {improvement:+.1f}"
    return f"{format_table(rows)}\n{note}\n{found}"


def openings_table(metrics: dict) -> str:
    """Format what lib.openings.compare returns."""
    measured, change = metrics["openings"], metrics.get("openings_change")
    rows, groups = [["forced openings"]], next(iter(measured.values()))
    for heading in PARTS.values():
        rows[0] += [heading] + ["change"] * bool(change)
    pairs = [(kind, strategy) for kind in groups for strategy in groups[kind]]
    for kind, strategy in pairs:
        row = [f"{kind}, {strategy}"]
        for part in PARTS:
            means = (of_one[kind][strategy][part]["mean"] for of_one in measured.values())
            row.append(" -> ".join(map(percent, means)))
            row += [signed(change[kind][strategy][part])] if change else []
        rows.append(row)
    return format_table(rows)
