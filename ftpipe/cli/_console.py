"""What a person sees while a pipeline runs: a line per stage, a bar for the stage at work, the summary at the end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ftpipe.secrets import Formatter
from ftpipe.stages.base import Listener

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact
    from ftpipe.pipeline.plan import Planned

console = Console(highlight=False, soft_wrap=not Console().is_terminal)


class ConsoleListener(Listener):
    """Draws a bar on a terminal; elsewhere (cron, a log file) prints a progress line every `every` seconds."""

    def __init__(self, every: float = 15.0):
        self.every, self._printed, self._began = every, 0.0, 0.0
        self.failed_stage: str | None = None
        self._bar: Progress | None = None
        self._task: Any = None

    def started(self, name: str, kind: str, key: str) -> None:
        self._began = self._printed = time.monotonic()
        console.print(f"[bold]▶ {name}[/bold] [dim]{kind} {key[:12]}[/dim]")

    def progress(self, name: str, done: float, total: float | None, unit: str, metrics: dict[str, float]) -> None:
        detail = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        if console.is_terminal:
            if self._bar is None:
                self._bar = Progress(TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"),
                                     TimeRemainingColumn(), console=console, transient=True)
                self._bar.start()
                self._task = self._bar.add_task(unit or name, total=total, detail=detail)
            self._bar.update(self._task, completed=done, total=total, detail=detail, description=unit or name)
        elif time.monotonic() - self._printed > self.every:
            self._printed = time.monotonic()
            console.print(f"  {name}: {done:g}{f' of {total:g}' if total else ''} {unit}  {detail}")

    def finished(self, name: str, artifact: Artifact, reused: bool) -> None:
        self._stop_bar()
        if reused:
            console.print(f"[dim]= {name}  reused {artifact.key[:12]}[/dim]")
            return
        counts = artifact.counts
        rows = f"  {counts['rows_kept']:,} of {counts['rows_in']:,} rows kept" if "rows_in" in counts else ""
        console.print(f"[green]✓[/green] {name}  {time.monotonic() - self._began:.1f} s{rows}")

    def failed(self, name: str, error: BaseException) -> None:
        self._stop_bar()
        self.failed_stage = name
        console.print(f"[red]✗ {name}[/red]")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def show_logs(level: int = logging.WARNING) -> None:
    """Send ftpipe's log to the console; the full log of a stage is in its artifact and under `ftpipe log`."""
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=level > logging.INFO)
    handler.setLevel(level)
    handler.setFormatter(Formatter("%(message)s"))
    logger = logging.getLogger("ftpipe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def plan_table(planned: list[Planned]) -> Table:
    """RUN or REUSE for every stage, and why."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "kind", "", "why", "key"):
        table.add_column(column, overflow="fold")
    for p in planned:
        what = "[yellow]RUN[/yellow]" if p.run else "[green]REUSE[/green]"
        table.add_row(p.name, p.kind, what, p.reason, p.key[:12] if p.key else "")
    return table
