"""How torch's threads wait for each other. Every script imports this file first: torch reads the setting once, when it is loaded.
A thread that has done its share of an operation waits for the others by spinning. On an idle machine that is fastest. Beside
other programs it keeps the CPU from the very thread that it waits for, and a step takes 2 to 14 times as long. So where the CPUs
are busy, waiting threads sleep. Where they are idle, they spin for a moment only, so that a load that comes later hurts less."""
import os
import sys
import time


def cpu_ticks():
    """(idle, all) ticks, since the machine started, of the CPUs that this process may use. Linux alone counts them."""
    usable = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    idle = total = 0
    with open("/proc/stat") as file:
        for line in file:
            name, *counts = line.split()
            if name in usable:
                idle += int(counts[3]) + int(counts[4])  # nothing to do; nothing to do until a disk answers
                total += sum(map(int, counts[:8]))       # the last two, of virtual machines, are within the first two
    return idle, total


def idle_share(seconds=.1):
    """For which share of the next seconds, 0 to 1, these CPUs have nothing to do. 1 where the machine does not count."""
    idle, total = cpu_ticks()
    time.sleep(seconds)
    later_idle, later_total = cpu_ticks()
    return (later_idle - idle) / (later_total - total) if later_total > total else 1.


def choose_waiting():
    """Sets how threads wait, unless the environment says so already, or there is one thread only."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if sys.platform != "linux" or chosen or os.environ.get("OMP_NUM_THREADS") == "1":
        return
    if idle_share() >= .5:
        os.environ["GOMP_SPINCOUNT"] = "10000"
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("the CPUs are busy: threads sleep while they wait (OMP_WAIT_POLICY=passive; setting it yourself overrides this)",
              file=sys.stderr)


choose_waiting()
