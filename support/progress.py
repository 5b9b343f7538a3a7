"""
Progress bars for long jobs: what is being done, how the reward stands, how much time is left.

On a terminal a bar redraws itself. A log file or a notebook keeps all that is written, so there it is a line now and then.
"""
import sys

from tqdm import tqdm

LINE_EVERY = 30.  # seconds between the lines of a job where nobody watches a terminal


class Lines:
    """Where a bar that is no terminal's writes: each state as a line of its own, without control characters, and once."""

    def __init__(self, file):
        self.file, self.last = file, ""

    def write(self, text):
        line = text.replace("\x1b[A", "").strip()
        if line and line != self.last:
            self.file.write(line + "\n")
        self.last = line or self.last

    def flush(self):
        self.file.flush()


def progress(iterable=None, desc=None, total=None, *, unit="it", initial=0, leave=True, disable=False):
    """
    tqdm's bar, on the standard error stream. `set_postfix_str(text, refresh=False)` says more with its next state.

    leave: whether its end stays on the terminal. In a log such a job has a line at its start and one at its end; a part of a job
    has lines only if it takes longer than LINE_EVERY.
    """
    given = {"desc": desc, "total": total, "unit": unit, "initial": initial, "leave": leave, "disable": disable}
    if not sys.stderr.isatty():
        given |= {"file": Lines(sys.stderr), "mininterval": LINE_EVERY, "maxinterval": LINE_EVERY,
                  "delay": 0 if leave else LINE_EVERY,
                  "bar_format": "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"}
    return tqdm(iterable, **given)
