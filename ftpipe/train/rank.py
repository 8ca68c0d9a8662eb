"""One rank of a training run, as a process: `python -m ftpipe.train.rank JOB.json`. Started by `launch`, never by hand."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from ftpipe.train.lifeline import Reporter, hold


def main(path: str) -> int:
    """Train as the job file says. Returns the exit status; what went wrong is reported to the parent first."""
    hold()
    report, several = Reporter(), False
    try:
        from ftpipe.train.loop import train
        from ftpipe.train.setup import Job

        job = Job.read(Path(path))
        several = bool(job.nodes)
        train(job, report)
        return 0
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        from ftpipe.errors import FtpipeError, InfrastructureError, TrainingError, may_pass
        from ftpipe.train.forward import memory_ran_out

        if not isinstance(error, FtpipeError) and memory_ran_out(error):
            error = TrainingError(f"out of memory while {report.doing}", remedy="the model, what trains and its optimizer's state do not fit: keep the base in "
                                  "few bits (`quantize: nf4` or `int8`), set dtype: bfloat16, train less of it (`adapt`), or spread it (more ranks, higher "
                                  "`zero`)")
        known, echo = isinstance(error, FtpipeError), several and _broken(error)
        kind = type(error).__name__ if known else InfrastructureError.__name__ if echo or may_pass(error) else ""
        report("failed", kind=kind, what=error.what if known else f"{type(error).__name__}: {error}",
               where=error.where if known else None, remedy=error.remedy if known else "run again, it resumes from the last checkpoint", echo=echo)
        return 1


def _broken(error: BaseException) -> bool:
    from ftpipe.train.watch import broken

    return broken(error)


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of torch.distributed may wait for ranks that are gone; nothing of value is left to do here.
    import os

    os._exit(status)
