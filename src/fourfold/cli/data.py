"""What `fourfold data` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from fourfold.examining import DataExamination, Segment, ShownRow

__all__ = ["print_data"]

BAR_WIDTH = 40
STYLES = {
    (True, False): "green",
    (True, True): "bold green reverse",
    (False, False): "dim",
    (False, True): "cyan reverse",
}


def print_data(seen: DataExamination) -> None:
    """Rows, lengths, what training gets, and the findings."""
    console = Console(highlight=False, soft_wrap=True)
    colours = console.color_system is not None
    legend = (
        Text("learned", style="green") + Text(", ") + Text("masked", style="dim") + Text(", special tokens reversed")
    )
    console.print(legend if colours else Text("⟦learned⟧, the rest is masked"))
    for row in seen.rows:
        console.print(_row(row, colours))
    if seen.histogram:
        console.print(Text("\ntokens a row"))
        most = max(seen.histogram.values())
        width = len(f"{max(seen.histogram):,}")
        for edge, count in seen.histogram.items():
            bar = "█" * -(-count * BAR_WIDTH // most)
            console.print(Text(f"  to {edge:>{width},} {bar} {count:,}"))
    if seen.supervised_share is not None:
        console.print(Text(f"\nlearned: {seen.supervised_share:.1%} of all tokens"))
    if seen.packing_waste is not None:
        console.print(Text(f"padding in packed sequences: {seen.packing_waste:.1%}"))
    for name, told_by in seen.told_by.items():
        if told_by and not seen.reports:
            console.print(Text(f"{name}: {told_by}"))
    for report in seen.reports:
        for line in report.lines():
            console.print(Text(line))
    _print_findings(console, seen)


def _row(row: ShownRow, colours: bool) -> Text:
    head = f"\n{row.dataset}, row {row.row_number}: {row.num_tokens} tokens, {row.num_learned} learned, {row.fate}\n"
    shown = Text(head, style="bold")
    for segment in row.segments:
        if colours:
            shown.append(segment.text, style=STYLES[segment.learned, segment.special])
    if not colours:
        shown.append(_marked(row.segments))
    return shown


def _marked(segments: list[Segment]) -> str:
    """Learned stretches between brackets, for where there are no colours."""
    marked = "".join(f"⟦{one.text}⟧" if one.learned else one.text for one in segments)
    return marked.replace("⟧⟦", "")


def _print_findings(console: Console, seen: DataExamination) -> None:
    console.print()
    if not seen.findings:
        console.print(Text("nothing wrong was found", style="green"))
    for finding in seen.findings:
        line = Text(f"{finding.severity}: ", style="bold red" if finding.severity == "error" else "bold yellow")
        console.print(line + Text(finding.what + (f" ({finding.rows})" if finding.rows else "")))
        if finding.hint:
            console.print(Text(f"  {finding.hint}", style="dim"))
