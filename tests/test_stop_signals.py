"""Processes that read data outlive a request to stop, but not the process that they read for."""

import subprocess
import sys

READS = """
import sys
from guided_diffusion_vae.data.stream import BatchStream

class Numbers:
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return i

stream = sys.kept = BatchStream(Numbers(), 2, num_workers=2, shuffle=False)
sys.round_about = [stream, sys]
print(next(stream).tolist())
{end}
"""


def test_a_process_with_readers_ends():
    """Also if something still holds the stream, such as the traceback of an error."""
    for end, code in (("", 0), ("raise SystemExit(2)", 2), ("1 / 0", 1)):
        run = subprocess.run([sys.executable, "-c", READS.format(end=end)], capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout) == (code, "[0, 1]\n")
        assert "worker" not in run.stderr
