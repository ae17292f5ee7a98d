"""What a job on Ray Train leaves behind: no process."""

import subprocess
import sys

import pytest

BORROWED = """
import ctypes, pickle, sys

from learners.remote import Leaving

libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)  # a native destructor that never ends
print("said")
if sys.argv[1] == "armed":
    arrived = pickle.loads(pickle.dumps(Leaving()))
"""


def begun(how):
    return subprocess.Popen([sys.executable, "-c", BORROWED, how], stdout=subprocess.PIPE, text=True)


def test_the_controller_of_a_job_ends_though_a_native_destructor_does_not():
    with begun("armed") as process:
        assert process.communicate(timeout=120)[0] == "said\n"
    assert process.returncode == 0


def test_without_it_that_destructor_holds_the_process():
    with begun("plain") as process:
        assert process.stdout.readline() == "said\n"  # Python itself has ended
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
