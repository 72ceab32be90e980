"""Results as Markdown tables, and the README around them."""

from pathlib import Path

BEGIN, END = "<!-- results: written by run.py -->", "<!-- end of results -->"


def cell(score: dict | None, expected: int) -> str:
    """An error in percent; with its rows in brackets where the method predicts fewer than the split has."""
    if score is None or not score["rows"]:
        return "–"
    text = f"{100 * score['mape']:.1f}"
    return text if score["rows"] == expected else f"{text} ({score['rows']})"


def error_table(entries: list[dict], methods: list[str], first: str = "split") -> list[str]:
    """Markdown lines: one row an entry {"split", "rows", "scores": {method: score}}, one column a method. The best
    method that predicts every row is in bold."""
    lines = [f"| {first} | rows | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for entry in entries:
        cells = {name: cell(entry["scores"].get(name), entry["rows"]) for name in methods}
        full = {n: entry["scores"][n]["mape"] for n in methods if cells[n] != "–" and "(" not in cells[n]}
        best = min(full.values(), default=None)
        cells |= {n: f"**{cells[n]}**" for n, value in full.items() if best is not None and value <= best + 1e-12}
        lines.append(f"| {entry['split']} | {entry['rows']} | " + " | ".join(cells[name] for name in methods) + " |")
    return lines


def pool(scores: list[dict]) -> dict | None:
    """One score from those of several folds: errors weighted by rows, the largest of the largest."""
    scores = [score for score in scores if score["rows"]]
    if not scores:
        return None
    rows = sum(score["rows"] for score in scores)
    return {
        "rows": rows,
        "mape": sum(score["rows"] * score["mape"] for score in scores) / rows,
        "max_ape": max(score["max_ape"] for score in scores),
    }


def rewrite(readme: Path, lines: list[str]) -> None:
    """Put ``lines`` between the markers of a README; without README or markers, write them alone."""
    block = "\n".join([BEGIN, "", *lines, "", END])
    text = readme.read_text() if readme.exists() else f"{BEGIN}{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{block}{after}")
