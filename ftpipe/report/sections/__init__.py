"""The parts of the page, in order. Each module has `build(run) -> dict | None`: what its template shows, or None where there is nothing to show."""
