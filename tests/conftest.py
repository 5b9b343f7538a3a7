"""One thread for all tests and the processes they start: tensors here are too small to share, and waiting threads spin."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
